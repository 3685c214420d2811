"""PSSCallback in Trainer, Seq2SeqTrainer, trl's trainers and sentence-transformers' trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from helpers import (
    VOCABULARY,
    arguments,
    checkpoint_differences,
    differences,
    events_of,
    gpt2,
    steps_of,
    token_rows,
    weights_of,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    set_seed,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from hf_pss import PSSCallback, PSSConfig, PSSTrainerMixin

MAX_STEPS, STOP_STEP = 6, 3
# Spikes and floors: both fire in these six steps, so that resuming has state to restore.
INTERVENES = PSSConfig.preset(
    "anchored",
    threshold_ratio=1.0001,
    calibration_steps=1,
    cooldown_steps=0,
    floor_ratio=1.3,
    check_every_steps=1,
)
WORDS = [f"w{number}" for number in range(24)]
LOGGED = ("step", "loss", "grad_norm", "learning_rate")


class StopsAt(TrainerCallback):
    """Ends a run after a step, as a time limit does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True


def tokenizer() -> PreTrainedTokenizerFast:
    special = ["[UNK]", "[PAD]", "[EOS]", "[CLS]"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="[UNK]",
        pad_token="[PAD]",
        eos_token="[EOS]",
        cls_token="[CLS]",
    )


def phrases(num_rows: int = 32, *, shift: int = 0) -> list[str]:
    return [
        " ".join(WORDS[(row * 5 + shift + place) % len(WORDS)] for place in range(5))
        for row in range(num_rows)
    ]


def word_gpt2(dropout: float = 0.1) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=1,
            n_embd=16,
            n_head=2,
            vocab_size=len(WORDS) + 4,
            n_positions=32,
            bos_token_id=2,
            eos_token_id=2,
            pad_token_id=1,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
        )
    )


def options_of(folder: Path) -> dict[str, Any]:
    kept = arguments(folder)
    names = (
        "output_dir",
        "per_device_train_batch_size",
        "logging_steps",
        "report_to",
        "disable_tqdm",
        "use_cpu",
        "dataloader_pin_memory",
        "seed",
    )
    given = {name: getattr(kept, name) for name in names}
    return {**given, "max_steps": MAX_STEPS, "save_steps": STOP_STEP, "learning_rate": 1e-2}


def plain_trainer(folder: Path, mixed: Any, **extra: Any) -> Trainer:
    args = arguments(folder, **options_of(folder))
    return mixed(Trainer)(model=gpt2(), args=args, train_dataset=token_rows(), **extra)


def seq2seq_trainer(folder: Path, mixed: Any, **extra: Any) -> Trainer:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return mixed(Seq2SeqTrainer)(
        model=T5ForConditionalGeneration(config),
        args=Seq2SeqTrainingArguments(**options_of(folder)),
        train_dataset=token_rows(),
        **extra,
    )


def sft_trainer(folder: Path, mixed: Any, **extra: Any) -> Trainer:
    return mixed(SFTTrainer)(
        model=word_gpt2(),
        args=SFTConfig(
            **options_of(folder), max_length=16, bf16=False, gradient_checkpointing=False
        ),
        train_dataset=Dataset.from_dict({"text": phrases()}),
        processing_class=tokenizer(),
        **extra,
    )


def dpo_trainer(folder: Path, mixed: Any, **extra: Any) -> Trainer:
    columns = {"prompt": phrases(), "chosen": phrases(shift=5), "rejected": phrases(shift=11)}
    return mixed(DPOTrainer)(
        model=word_gpt2(),
        ref_model=word_gpt2(),
        args=DPOConfig(
            **options_of(folder), max_length=16, bf16=False, gradient_checkpointing=False
        ),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer(),
        **extra,
    )


def grpo_trainer(folder: Path, mixed: Any, **extra: Any) -> Trainer:
    def share_of_even_tokens(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]

    return mixed(GRPOTrainer)(
        model=word_gpt2(dropout=0.0),
        reward_funcs=share_of_even_tokens,
        args=GRPOConfig(
            **options_of(folder),
            num_generations=4,
            max_completion_length=4,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": phrases()}),
        processing_class=tokenizer(),
        **extra,
    )


def sentence_trainer(folder: Path, mixed: Any, **extra: Any) -> Trainer:
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    bert = BertModel(
        BertConfig(
            vocab_size=len(WORDS) + 4,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=32,
            pad_token_id=1,
        )
    )
    source = folder.with_name(f"{folder.name}_model")
    bert.save_pretrained(source)
    tokenizer().save_pretrained(source)
    embedder = Transformer(str(source), max_seq_length=16)
    model = st.SentenceTransformer(modules=[embedder, Pooling(16)], device="cpu")
    return mixed(st.SentenceTransformerTrainer)(
        model=model,
        args=st.SentenceTransformerTrainingArguments(**options_of(folder)),
        train_dataset=Dataset.from_dict({"anchor": phrases(), "positive": phrases(shift=1)}),
        loss=MultipleNegativesRankingLoss(model),
        **extra,
    )


BUILDERS: dict[str, Callable[..., Trainer]] = {
    "Trainer": plain_trainer,
    "Seq2SeqTrainer": seq2seq_trainer,
    "SFTTrainer": sft_trainer,
    "DPOTrainer": dpo_trainer,
    "GRPOTrainer": grpo_trainer,
    "SentenceTransformerTrainer": sentence_trainer,
}


def itself(trainer_class: type[Trainer]) -> type[Trainer]:
    return trainer_class


def with_mixin(trainer_class: type[Trainer]) -> type[Trainer]:
    return type(f"PSS{trainer_class.__name__}", (PSSTrainerMixin, trainer_class), {})


def run(
    build: Callable[..., Trainer],
    folder: Path,
    *,
    mixed: Any = itself,
    resume: Path | None = None,
    **extra: Any,
) -> Trainer:
    set_seed(7)
    trainer = build(folder, mixed, **extra)
    trainer.train(resume_from_checkpoint=str(resume) if resume is not None else None)
    return trainer


def trajectory(trainer: Trainer) -> dict[str, Any]:
    """Return everything of a run that the seed determines."""
    log = [line for line in trainer.state.log_history if "loss" in line]
    return {
        "log": [{name: line[name] for name in LOGGED} for line in log],
        "weights": weights_of(trainer.model),
        "events": [without_clocks(event) for event in events_of(Path(trainer.args.output_dir))],
    }


def without_clocks(event: Any) -> Any:
    if isinstance(event, dict):
        return {k: without_clocks(value) for k, value in event.items() if k != "seconds"}
    return [without_clocks(one) for one in event] if isinstance(event, list) else event


def run_differences(one: Trainer, other: Trainer) -> list[str]:
    folders = [Path(t.args.output_dir) / f"checkpoint-{MAX_STEPS}" for t in (one, other)]
    return [
        *differences(trajectory(one), trajectory(other)),
        *checkpoint_differences(*folders),
    ]


@pytest.mark.parametrize("kind", BUILDERS)
def test_the_callback_gives_the_run_of_the_mixin(kind: str, tmp_path: Path) -> None:
    build = BUILDERS[kind]
    called = run(build, tmp_path / "called", callbacks=[PSSCallback(INTERVENES)])
    mixed = run(build, tmp_path / "mixed", mixed=with_mixin, pss_config=INTERVENES)
    assert len(steps_of(events_of(tmp_path / "called"))) > 1
    assert run_differences(called, mixed) == []


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_stopped_run_with_the_callback_resumes_to_the_bit(kind: str, tmp_path: Path) -> None:
    build = BUILDERS[kind]
    whole = run(build, tmp_path / "whole", callbacks=[PSSCallback(INTERVENES)])
    folder = tmp_path / "parts"
    stopped = run(build, folder, callbacks=[PSSCallback(INTERVENES), StopsAt(STOP_STEP)])
    assert stopped.state.global_step == STOP_STEP
    assert steps_of(events_of(folder))
    checkpoint = folder / f"checkpoint-{STOP_STEP}"
    resumed = run(build, folder, resume=checkpoint, callbacks=[PSSCallback(INTERVENES)])
    assert run_differences(whole, resumed) == []
