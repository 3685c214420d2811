"""What the demo trains: one small GPT-2, one learning rate that hurts it, and the guards.

Where a demo writes, and how the results of an earlier one are cleared away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from hf_pss.config import PRESETS, PSSConfig
from hf_pss.errors import ConfigurationError
from hf_pss.runs.folder import EVENTS_FILE, HEALTH_FILE, METRICS_FILE, SUMMARY_FILE

__all__ = [
    "GUARDS",
    "LOG_FILE",
    "DemoRecipe",
    "remove_earlier_demo",
    "run_folder",
]

GUARDS: Mapping[str, PSSConfig] = MappingProxyType(
    {
        # Bit for bit the plain Trainer: it watches and notes, and never touches anything.
        "plain": PSSConfig(observe_only=True),
        **{name: PSSConfig.preset(name) for name in PRESETS},
    }
)
"""The twins: the same seed and data, each under another guard."""


@dataclass(frozen=True, slots=True)
class DemoRecipe:
    """Numbers of the demo's training, at a learning rate above its best one."""

    num_layers: int = 8
    width: int = 64
    num_heads: int = 4
    context_length: int = 64
    vocab_size: int = 2048
    batch_size: int = 16
    learning_rate: float = 1e-2
    num_steps: int = 800
    warmup_steps: int = 20
    """Linear; then constant, and over the last 40 % of the steps linear decay to zero."""
    weight_decay: float = 0.1
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    eval_every_steps: int = 100
    num_eval_blocks: int = 256
    health_every_steps: int = 20

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0 and name != "max_grad_norm":
                raise ConfigurationError(f"{name} must be above 0; you gave {value!r}.")
        if self.width % self.num_heads:
            raise ConfigurationError(
                f"{self.num_heads} heads do not divide a width of {self.width}; choose a multiple."
            )

    def model(self) -> GPT2LMHeadModel:
        """Return the untrained model; its weights come from torch's global seed."""
        return GPT2LMHeadModel(
            GPT2Config(
                n_layer=self.num_layers,
                n_embd=self.width,
                n_head=self.num_heads,
                n_positions=self.context_length,
                vocab_size=self.vocab_size,
                # No dropout: twins differ by their guard alone, and a step draws no random number.
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=0,
                eos_token_id=0,
                use_cache=False,
            )
        )

    def arguments(
        self, output_dir: Path, seed: int, *, use_cpu: bool = True, **changes: Any
    ) -> TrainingArguments:
        """Return the training arguments of one run, the same for every guard."""
        return TrainingArguments(
            output_dir=str(output_dir),
            seed=seed,
            use_cpu=use_cpu,
            max_steps=self.num_steps,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=64,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            adam_beta2=self.adam_beta2,
            max_grad_norm=self.max_grad_norm,
            warmup_steps=min(self.warmup_steps, self.num_steps // 2),
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={
                "num_decay_steps": round(0.4 * self.num_steps),
                "decay_type": "linear",
            },
            eval_strategy="steps",
            eval_steps=min(self.eval_every_steps, self.num_steps),
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
            dataloader_num_workers=0,
            **changes,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain JSON."""
        return asdict(self)


LOG_FILE = "train.log"
_RUN_FILES = (METRICS_FILE, SUMMARY_FILE, EVENTS_FILE, HEALTH_FILE, LOG_FILE)


def run_folder(out: Path, guard: str, seed: int) -> Path:
    """Return where one run writes."""
    return out / guard / f"seed-{seed}"


def remove_earlier_demo(out: Path) -> None:
    """Leave nothing of an earlier demo that could pass for a result of the next one.

    Files that no demo writes stay, and so do the folders that hold them.

    Raises:
        ConfigurationError: Something in the way cannot be removed.
    """
    folders = [x for guard in GUARDS for x in (out / guard).glob("seed-*") if _is_run_folder(x)]
    try:
        for path in (out / "report.html", *(x / name for x in folders for name in _RUN_FILES)):
            path.unlink(missing_ok=True)
        for folder in (*folders, *(out / guard for guard in GUARDS)):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    except OSError as error:
        raise ConfigurationError(
            f"What an earlier demo left in {out} cannot be removed: {error}. Choose another folder."
        ) from error


def _is_run_folder(path: Path) -> bool:
    return path.is_dir() and path.name.removeprefix("seed-").isdecimal()
