"""What the processes of one run tell each other."""

import torch
import torch.distributed as dist


def of_all_processes(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The rows of every process, in the order of ranks; they may differ in number."""
    if not _several():
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


def any_process(asked: bool, device: torch.device) -> bool:
    """Whether it was asked of any process; every process gets the same answer."""
    return bool(_any(asked, device)) if _several() else asked


class AnyAsked:
    """Whether any process was asked to stop: the same answer in all of them at the same step.

    With several processes it is what was asked up to the step before. Its answer has arrived by
    then, and no step waits for a number on its way from the GPU.
    """

    def __init__(self) -> None:
        self._answer = torch.zeros(1)
        self._arrival: torch.cuda.Event | None = None

    def at_step_end(self, asked: bool, device: torch.device) -> bool:
        """Every process calls it at the end of every step."""
        if not _several():
            return asked
        if self._arrival is not None:
            self._arrival.synchronize()
        before = bool(self._answer)
        self._answer = _any(asked, device).to("cpu", non_blocking=True)
        if device.type == "cuda":
            self._arrival = torch.cuda.current_stream(device).record_event()
        return before


def _any(asked: bool, device: torch.device) -> torch.Tensor:
    flag = torch.full((1,), float(asked), device=device)  # filled there: nothing is copied
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return flag


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
