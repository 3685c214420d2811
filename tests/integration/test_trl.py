"""trl: SFTTrainer with PSS attached and mixed in, and TrlParser; offline, tiny tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from helpers import OUT_OF_REACH, controller_of, events_of, run_differences, steps_of
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl import SFTConfig, SFTTrainer, TrlParser

from hf_pss import PSSCallback, PSSConfig, PSSTrainerMixin, PSSTrainingArguments

# Acts in every step: no noise's stable rank is above 1.3 times its own.
HIGH_FLOOR = PSSConfig.preset("floor", floor_ratio=1.3, check_every_steps=1)
TEXTS = [f"number {i} is followed by number {i + 1}" for i in range(32)]


class PSSSFTTrainer(PSSTrainerMixin, SFTTrainer):
    """What a user writes."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<pad>", "<eos>"]
    words.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )


def make_trainer(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    trainer_class: type[SFTTrainer] = SFTTrainer,
    **options: Any,
) -> SFTTrainer:
    set_seed(7)
    config = GPT2Config(
        n_layer=1,
        n_embd=16,
        n_head=2,
        vocab_size=len(tokenizer),
        n_positions=32,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    )
    arguments = SFTConfig(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=6,
        max_length=32,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        seed=7,
    )
    return trainer_class(
        model=GPT2LMHeadModel(config),
        args=arguments,
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
        **options,
    )


def test_attached_and_mixed_in_smooth_alike(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    attached = make_trainer(tmp_path / "attached", tokenizer)
    options = attached.args.to_dict()
    PSSCallback(HIGH_FLOOR).attach(attached)
    attached.train()
    mixed = make_trainer(tmp_path / "mixed", tokenizer, PSSSFTTrainer, pss_config=HIGH_FLOOR)
    mixed.train()
    assert steps_of(events_of(tmp_path / "attached")) == steps_of(events_of(tmp_path / "mixed"))
    assert steps_of(events_of(tmp_path / "mixed"))
    assert run_differences(attached, mixed) == []
    mixed.create_model_card()
    card = (tmp_path / "mixed" / "README.md").read_text(encoding="utf-8")
    assert "[TRL]" in card
    assert "- rank floor, smoothed: " in card
    assert attached.args.to_dict() == options  # its own arguments are untouched
    assert {"mean_token_accuracy", "pss/interventions"} <= set(attached.state.log_history[0])


def test_never_triggered_is_the_unattached_run(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = make_trainer(tmp_path / "plain", tokenizer)
    plain.train()
    attached = make_trainer(tmp_path / "attached", tokenizer)
    PSSCallback(OUT_OF_REACH["anchored"]).attach(attached)
    attached.train()
    assert run_differences(plain, attached) == []
    assert controller_of(attached).step_number == 6


def test_trl_parser_reads_our_arguments_and_the_command_line_wins(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    options = {"pss_preset": "floor", "pss_floor_ratio": 0.7, "pss_roles": ["mlp"]}
    path.write_text(yaml.safe_dump({"output_dir": str(tmp_path), "use_cpu": True, **options}))
    (parsed,) = TrlParser(PSSTrainingArguments).parse_args_and_config(
        ["--config", str(path), "--pss_floor_ratio", "0.9", "--pss_observe_only"]
    )
    assert parsed.pss_config() == PSSConfig.preset(
        "floor", floor_ratio=0.9, roles=("mlp",), observe_only=True
    )
