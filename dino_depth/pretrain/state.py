"""What a training step changes, and so what a checkpoint holds."""

from dataclasses import dataclass

import torch

from dino_depth.config import PretrainConfig
from dino_depth.pretrain.distill import SecondTeacher
from dino_depth.pretrain.health import CollapseGate
from dino_depth.pretrain.optim import build_optimizer
from dino_depth.pretrain.student_teacher import Networks

__all__ = ["TrainingState"]


@dataclass
class TrainingState:
    """A run between two steps. Data order, crops, masks and dropped samples are functions of (seed, step).

    Attributes:
        second: a frozen teacher; its fingerprint is kept, its weights are not.
        step: steps done.
        bad: those of them, up to the last one, that had no finite loss.
    """

    student: Networks
    teacher: Networks
    optimizer: torch.optim.AdamW
    gate: CollapseGate
    second: SecondTeacher | None
    step: int = 0
    bad: int = 0

    @classmethod
    def begin(cls, config: PretrainConfig, device: torch.device) -> "TrainingState":
        """At step 0; teacher and student are equal."""
        second = SecondTeacher(config, device) if config.distill.teacher else None
        torch.manual_seed(config.train.seed)
        dim = second.dim if second else 0
        student, teacher = Networks(config, dim).to(device), Networks(config, dim).to(device).requires_grad_(False)
        teacher.load_state_dict(student.state_dict())
        gate = CollapseGate(config.health, config.train.steps)
        return cls(student, teacher, build_optimizer(student, config), gate, second)

    @property
    def networks(self) -> dict[str, Networks]:
        return {"student": self.student, "teacher": self.teacher}

    def saved(self) -> dict:
        """What a checkpoint holds."""
        state = {"step": self.step, "bad": self.bad, "gate": self.gate.state()}
        state |= {"optimizer": self.optimizer.state_dict()}
        state |= {name: part.state_dict() for name, part in self.networks.items()}
        return state | ({"second": self.second.fingerprint} if self.second else {})

    def restore(self, saved: dict):
        """Continues from what :meth:`saved` gave.

        Raises:
            ConfigError: the second teacher is another one.
        """
        if self.second:
            self.second.require(saved.get("second"))
        for name, part in self.networks.items():
            part.load_state_dict(saved[name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.gate.restore(saved["gate"])
        self.step, self.bad = saved["step"], saved["bad"]
