"""Several processes that prune one model together, and what they tell each other (torch.distributed by Accelerate)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist


class Processes:
    """The processes of a run: each has the whole model, and they share out calibration data and rows to solve.

    They are those that `accelerate launch` or `torchrun` has started; one that was started alone talks to nobody.
    Whatever they ask each other, all of them have to ask, in the same order.

    Raises:
        ValueError: Accelerate was told before that this process is alone, though several were launched.

    Attributes:
        count: How many there are.
        index: Which of them this is.
        is_main: Whether it is the first, which alone writes files and shows progress.
        num_local: How many of them are on this machine.
        device: The device that Accelerate gives this one, `None` if it is alone.
    """

    def __init__(self) -> None:
        self.count, self.index, self.num_local = 1, 0, 1
        self.device: torch.device | None = None
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if dist.is_available() and (dist.is_initialized() or launched > 1):
            from accelerate import PartialState

            state = PartialState(cpu=not torch.cuda.is_available())
            self.count, self.index = state.num_processes, state.process_index
            if self.count == 1 < launched:
                raise ValueError(
                    f"{launched} processes were launched, but Accelerate was set up before as if each were alone: "
                    "on CPUs, create accelerate.PartialState(cpu=True) or Accelerator(cpu=True), or none."
                )
            self.num_local = int(os.environ.get("LOCAL_WORLD_SIZE", self.count))
            self.device = state.device
        self.is_main = self.index == 0

    def check_device(self, device: torch.device) -> None:
        """See that tensors on a device can be exchanged.

        Raises:
            ValueError: They cannot.
        """
        if self.count > 1 and dist.get_backend() == "nccl" and device.type == "cpu":
            raise ValueError(
                f"This process computes on the CPU, but {self.count} processes were started that exchange GPU memory "
                "(nccl): move the model to accelerate.PartialState().device, or launch with --cpu."
            )

    def check_same(self, facts: Mapping[str, str]) -> None:
        """See that all processes have the same of everything.

        Args:
            facts: A SHA-256 in hexadecimal digits for each name.

        Raises:
            ValueError: They have not; raised in all of them.
        """
        if self.count == 1:
            return
        digits = [[int(digest[start : start + 8], 16) for start in range(0, 64, 8)] for digest in facts.values()]
        least = torch.tensor(digits, device=self.device)
        most = least.clone()
        dist.all_reduce(least, dist.ReduceOp.MIN)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        differ = (least != most).any(dim=1).tolist()
        if any(differ):
            names = ", ".join(name for name, different in zip(facts, differ, strict=True) if different)
            raise ValueError(
                f"The {self.count} processes differ in: {names}. Each has to load the same model, and to be given the "
                "same configuration and the same calibration data, which are shared out then."
            )

    def sum_(self, tensor: torch.Tensor) -> None:
        """Make a tensor the sum of those of all processes."""
        if self.count > 1:
            dist.all_reduce(tensor)

    def totals(self, *counts: int) -> list[int]:
        """For each count, its sum over all processes."""
        return self._reduced(counts, dist.ReduceOp.SUM) if self.count > 1 else list(counts)

    def least(self, value: int) -> int:
        """The smallest of the values of all processes."""
        return self._reduced([value], dist.ReduceOp.MIN)[0] if self.count > 1 else value

    def most(self, value: int) -> int:
        """The largest of the values of all processes."""
        return -self.least(-value)

    def share(self, rows: int, index: int | None = None) -> slice:
        """Which of so many rows a process has, by default this one: all equally many, the last ones fewer or none."""
        index, each = self.index if index is None else index, -(-rows // self.count)
        return slice(min(index * each, rows), min((index + 1) * each, rows))

    def gather(self, own: torch.Tensor, rows: int) -> torch.Tensor:
        """The rows of all processes, `[rows, ...]`, from each one's `share`."""
        if self.count == 1:
            return own
        each = -(-rows // self.count)
        padded = own.new_zeros(each, *own.shape[1:])
        padded[: len(own)] = own
        whole = own.new_empty(each * self.count, *own.shape[1:])
        # As bytes, since not every backend takes every dtype.
        dist.all_gather_into_tensor(whole.view(torch.uint8), padded.view(torch.uint8))
        return whole[:rows]

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.count > 1:
            dist.barrier()

    def end(self) -> None:
        """Nothing more will be exchanged; left to the end of the program, this may wait for ever."""
        if self.count > 1:
            self.wait()
            dist.destroy_process_group()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the body before the others."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def _reduced(self, values: object, operation: dist.ReduceOp.RedOpType) -> list[int]:
        tensor = torch.tensor(values, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, operation)
        return tensor.tolist()
