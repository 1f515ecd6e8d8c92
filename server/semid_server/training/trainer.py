"""One step of training after another: optimizers, schedule, and a state to go on from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from semid_server.model.layers import DEFAULT_OPTIMIZER
from semid_server.model.ranks import together

if TYPE_CHECKING:
    from torch import Tensor

    from semid_server.model import ResidualQuantization
    from semid_server.model.residual_quantization import TrainingStep


class Trainer:
    """Trains a model batch by batch until ``max_steps`` steps are counted.

    Steps that initialise a layer are taken by a plain SGD(lr=0.5) and not counted; all others are
    taken by the model's optimizer and its scheduler. With `torch.distributed` set up, gradients
    are averaged over the ranks, each of which calls `step` with rows of its own. Batches may come
    from anywhere, a `torch.utils.data.DataLoader` as well as `semid_server.training.batches`.

    Parameters
    ----------
    model : ResidualQuantization
        Trained in place, on the device where it lies.
    max_steps : int
        Counted steps, shared out evenly among the layers when they train one after the other.
    """

    def __init__(self, model: ResidualQuantization, *, max_steps: int) -> None:
        self.model = model
        self.max_steps = max_steps
        self.counted_steps = 0
        self.steps = 0
        self._initial_optimizer = DEFAULT_OPTIMIZER(model.parameters())
        self._optimizer = model.optimizer(model.parameters())
        self._scheduler = model.scheduler(self._optimizer) if model.scheduler else None

    @property
    def done(self) -> bool:
        """Whether all steps have been counted."""
        return self.counted_steps >= self.max_steps

    def step(self, batch: Tensor) -> TrainingStep:
        """Train on embeddings ``batch`` (n, D), on the model's device."""
        self.model.train()
        initial = self.model.takes_initial_step
        optimizer = self._initial_optimizer if initial else self._optimizer
        optimizer.zero_grad()
        outcome = self.model.model_step(batch)
        if outcome.loss.requires_grad:
            outcome.loss.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
            self._average_gradients()
            optimizer.step()
        self.steps += 1
        if not initial:
            self.counted_steps += 1
            if self._scheduler is not None:
                self._scheduler.step()
            self.model.advance(self.counted_steps, self.max_steps)
        return outcome

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on besides its batch: tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "layers": [layer.training_state() for layer in self.model.layers],
            "current_layer": self.model.current_layer,
            "counted_steps": self.counted_steps,
            "steps": self.steps,
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict() if self._scheduler else None,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave, as if training had never stopped."""
        self.model.load_state_dict(state["model"])
        for layer, layer_state in zip(self.model.layers, state["layers"], strict=True):
            layer.load_training_state(layer_state)
        self.model.current_layer = state["current_layer"]
        self.counted_steps = state["counted_steps"]
        self.steps = state["steps"]
        self._optimizer.load_state_dict(state["optimizer"])
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random"].cpu())
        if state["random_cuda"]:
            torch.cuda.set_rng_state_all([value.cpu() for value in state["random_cuda"]])

    def _average_gradients(self) -> None:
        if not together():
            return
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                distributed.all_reduce(parameter.grad)
                parameter.grad /= distributed.get_world_size()
