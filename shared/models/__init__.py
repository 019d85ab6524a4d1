"""What both stages ask of models and tokenizers from `transformers`."""
