"""The training loop that every stage runs: schedule, clipping, log, samples, and a state on disk from which a run goes on.

Owns one stage's steps and its files in the run's folder: ``NAME.state.safetensors`` (weights, both AdamW moments, the step),
``NAME.jsonl`` (a line every LOG_EVERY steps) and ``samples/NAME-STEP.png``. All chance is drawn afresh from (seed, stage,
step), so going on from a state gives bit for bit what an uninterrupted run gives (on one machine).
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

from ..errors import RequestError
from ..progress import Tick, silent
from .batches import Draws
from .files import write_tensors
from .recipe import StageSettings

LOG_EVERY = 25

# One step: the draws of this step -> the loss to go down, and numbers for the log.
Step = Callable[[Draws], tuple[torch.Tensor, dict[str, float]]]


class Stage:
    """One stage of a run: what is trained, its settings, and where it is kept."""

    def __init__(
        self, name: str, folder: Path, settings: StageSettings, seed: int, parameters: Mapping[str, nn.Parameter],
        masks: Mapping[nn.Parameter, torch.Tensor] | None = None,
    ):
        """parameters: by the name under which they are kept. masks: 1 where a value may change, for some parameters.

        Raises:
            RequestError: masks with weight decay, which would shrink what is masked.
        """
        if masks and settings.weight_decay:
            raise RequestError(f"{name}: weight_decay is {settings.weight_decay}, expected 0 in this stage: part of its weights"
                               " is held fixed, and decay would shrink it")
        self.name, self.folder, self.settings, self.seed = name, Path(folder), settings, seed
        self.parameters = dict(parameters)
        self.masks = {parameter: mask for parameter, mask in (masks or {}).items() if not bool(mask.all())}
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), lr=settings.rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay)
        self.step = 0

    @property
    def state_file(self) -> Path:
        return self.folder / f"{self.name}.state.safetensors"

    def run(
        self, step: Step, *, sample: Callable[[], Image.Image] | None = None, on_tick: Tick = silent,
        on_log: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Train from where the state on disk stands to the last step; ticks per step, which may raise to stop.

        What is finished is kept whatever happens: the state is written every ``save_every`` seconds, and on the way out.

        Raises:
            RequestError: the loss is not finite.
        """
        if self.state_file.is_file():
            self.load()
        total, began, first, saved = self.settings.steps, time.time(), self.step, time.time()
        running: dict[str, float] = {}
        on_tick(self.step, total, None)
        try:
            while self.step < total:
                loss, numbers = self._one(step)
                for key, value in {"loss": loss, **numbers}.items():
                    running[key] = value if key not in running else 0.9 * running[key] + 0.1 * value
                self.step += 1
                if self.step % LOG_EVERY == 0 or self.step == total:
                    on_log(self._log(running, (time.time() - began) / (self.step - first)))
                if sample is not None and (self.step % self.settings.sample_every == 0 or self.step == total):
                    folder = self.folder / "samples"
                    folder.mkdir(exist_ok=True)
                    sample().save(folder / f"{self.name}-{self.step:06d}.png")
                if time.time() - saved > self.settings.save_every:
                    self.save()
                    saved = time.time()
                on_tick(self.step, total, None)
        finally:
            if self.step > first:
                self.save()
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None

    def _one(self, step: Step) -> tuple[float, dict[str, float]]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        loss, numbers = step(Draws.of(self.seed, self.name, self.step))
        self.optimizer.zero_grad()
        loss.backward()
        for parameter, mask in self.masks.items():
            if parameter.grad is not None:
                parameter.grad *= mask
        norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), self.settings.clip)
        if not math.isfinite(float(norm)):
            raise RequestError(f"{self.name} step {self.step}: the gradient is {float(norm)} at a loss of {loss.item():.4g}, "
                               f"expected a finite number: lower 'rate' ({self.settings.rate}) in the recipe")
        self.optimizer.step()
        return loss.item(), {**numbers, "norm": float(norm)}

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to a fiftieth."""
        settings = self.settings
        part = min(1.0, step / max(1, settings.steps))
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * part))
        return settings.rate * min(1.0, (step + 1) / max(1, settings.warmup)) * cosine

    def _log(self, numbers: dict[str, float], seconds: float) -> str:
        line = {"step": self.step, **{key: round(value, 5) for key, value in numbers.items()}, "seconds": round(seconds, 3)}
        with open(self.folder / f"{self.name}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return f"{self.name} " + " ".join(f"{key} {value:.4g}" for key, value in line.items())

    def save(self) -> None:
        """Write the state whole or not at all; ``load`` is its inverse. Raises RequestError if the disk refuses."""
        tensors = {}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state.get(parameter, {})
            tensors[name] = parameter
            for kind in ("exp_avg", "exp_avg_sq"):
                if kind in state:
                    tensors[f"{kind}/{name}"] = state[kind]
        write_tensors(tensors, self.state_file, {"step": str(self.step), "stage": self.name})

    def load(self) -> None:
        """Take weights, moments and step from the state on disk.

        Raises:
            RequestError: the state belongs to other parameters.
        """
        with safe_open(self.state_file, "pt") as file:
            kept = set(file.keys())
            if missing := set(self.parameters) - kept:
                raise RequestError(f"{self.state_file} lacks {len(missing)} of {len(self.parameters)} parameters "
                                   f"({sorted(missing)[0]}): it was made by another recipe; choose another folder")
            self.step = int(file.metadata()["step"])
            for name, parameter in self.parameters.items():
                value = file.get_tensor(name)
                if value.shape != parameter.shape:
                    raise RequestError(f"{self.state_file}: {name} is {tuple(value.shape)}, expected {tuple(parameter.shape)}: "
                                       "it was made by another recipe; choose another folder")
                with torch.no_grad():
                    parameter.copy_(value)
                if f"exp_avg/{name}" in kept:
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(float(self.step)),
                        **{kind: file.get_tensor(f"{kind}/{name}").to(parameter.device) for kind in ("exp_avg", "exp_avg_sq")}}
