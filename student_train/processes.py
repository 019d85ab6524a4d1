"""What the processes of one run tell each other."""

import torch
import torch.distributed as dist


def of_all_processes(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The rows of every process, in the order of ranks; they may differ in number."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return rows
    counts = [
        torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())
    ]
    dist.all_gather(counts, torch.tensor([len(rows)], device=device))
    longest = int(torch.cat(counts).max())
    padded = rows.new_zeros(longest, rows.shape[1]).to(device)
    padded[: len(rows)] = rows.to(device)
    everyone = [torch.zeros_like(padded) for _ in counts]
    dist.all_gather(everyone, padded)
    parts = zip(everyone, counts, strict=True)
    return torch.cat([part[: int(count)] for part, count in parts]).cpu()
