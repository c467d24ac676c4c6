"""Progress of a training job: steps, tokens, losses, and the best validation so far. Checkpoints carry it."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Position:
    """Progress of a job; `identity` hashes its data, base model and settings."""

    identity: str
    step: int = 0  # optimiser steps done
    tokens: int = 0
    seconds: float = 0.0  # of training, over all starts
    rate_factor: float = 1.0  # of the learning rate; halved after training diverged
    clipped: float = 0.0  # sum over steps of the fraction of gradient values that were clipped
    losses: list[float] = field(default_factory=list)  # of each step
    validated: dict[int, float] = field(default_factory=dict)  # step -> loss on the validation rows; 0 is untrained

    @property
    def best(self) -> int:
        """The step with the lowest validation loss; 0 before the first validation."""
        trained = {step: loss for step, loss in self.validated.items() if step}
        return min(trained, key=lambda step: (trained[step], step), default=0)

    @property
    def without_gain(self) -> int:
        """Validations since the best one."""
        return sum(step > self.best for step in self.validated) if self.best else 0

    def ends(self) -> tuple[float, float]:
        """Mean training losses of the first and the last few steps."""
        few = max(1, min(10, len(self.losses) // 4))
        return sum(self.losses[:few]) / few, sum(self.losses[-few:]) / few
