"""The props that the golden caches of format 1 were made from: corpus.txt and the folder teacher.

Kept to show where the caches come from. Run again, it need not give the same bytes elsewhere: the
teacher's random weights and its arithmetic are the machine's and torch's.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = "the a of and to in is it you that he was for on are with as his they be at one have this"
NUM_IDS = 290  # above 256, so that ids take two bytes

words = WORDS.split()
generator = torch.Generator().manual_seed(1)
lines = []
for index in range(700):
    count = int(torch.randint(1, 24, (1,), generator=generator))
    picks = torch.randint(0, len(words), (count,), generator=generator).tolist()
    lines.append(" ".join(words[pick] for pick in picks) + ".?!"[index % 3])
Path("corpus.txt").write_text("\n".join(lines) + "\n")

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    vocab_size=NUM_IDS,
    special_tokens=["<|end|>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
)
tokenizer.train(["corpus.txt"], trainer)

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=NUM_IDS,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=0,
)
teacher = LlamaForCausalLM(config)
with torch.no_grad():
    teacher.lm_head.weight.mul_(40)  # distributions far from flat
teacher.save_pretrained("teacher")
PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained("teacher")
