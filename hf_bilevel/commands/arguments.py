"""What the commands take beside ``TrainingArguments`` and the config of the method."""

import importlib.util
from dataclasses import dataclass, field

from hf_bilevel.commands.recipe import nearest
from hf_bilevel.trainers.config import check_types, shown

TASKS = ("causal_lm", "masked_lm", "sequence_classification", "image_classification")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class ModelArguments:
    """The model to train.

    Args:
        model: Id on the Hub or local folder.
        task: What it is trained for, one of ``TASKS``.
        dtype: Of the weights. Mixed precision is another thing: ``bf16`` of the ``TrainingArguments``.
        attn_implementation: As for ``from_pretrained``; the model's choice if None.
        trust_remote_code: Run code that comes with the model.
        peft: Train a LoRA adapter instead of the model.
        lora_rank: Rank of the adapter.
        lora_alpha: Its scale, over the rank; twice the rank if None.
        lora_targets: Ends of the names of the layers that get one; all linear layers but the head if None.

    Raises:
        ValueError: If a value is not allowed, or peft is asked for and not installed.

    Example:
        >>> ModelArguments(model="gpt2", task="causal_ml")
        Traceback (most recent call last):
        ValueError: `task` must be one of causal_lm, masked_lm, sequence_classification, image_classification; got 'causal_ml'. Do you mean `causal_lm`?
    """

    model: str | None = field(default=None, metadata={"help": "Model id on the Hub, or local folder."})
    task: str = field(default="causal_lm", metadata={"help": f"What to train for: {', '.join(TASKS)}."})
    dtype: str = field(default="float32", metadata={"help": f"Of the weights: {', '.join(DTYPES)}."})
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention: eager, sdpa, flash_attention_2, ...; the model's choice if not set."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of the model."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Scale of the adapter; twice the rank if not set."})
    lora_targets: list[str] | None = field(
        default=None,
        metadata={"help": "Ends of the names of the layers that get an adapter; all linear ones if not set."},
    )

    def __post_init__(self) -> None:
        check_types(self)
        if not self.model:
            raise ValueError("`model` is not set: give the id of a model on the Hub, or the path of a local folder.")
        for name, allowed in (("task", TASKS), ("dtype", DTYPES)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(allowed)}; got {shown(value)}.{nearest(value, allowed, '')}"
                )
        if self.lora_rank < 1:
            raise ValueError(f"`lora_rank` must be at least 1, got {self.lora_rank}.")
        if self.peft and importlib.util.find_spec("peft") is None:
            raise ValueError(
                "`peft` needs the package peft, which is not installed: `pip install peft`, or drop `peft`."
            )


@dataclass
class DataArguments:
    """The datasets: the pool to train on, the target that shows what good means, and what to evaluate on.

    A dataset is an id on the Hub (``name`` or ``name:config``), a file (json, jsonl, csv, parquet, txt), or a folder: of such
    files, of images with a subfolder for each class, or written by ``save_to_disk``.

    Args:
        train_dataset: The pool.
        train_split: Its split, also a part such as ``train[:10%]``; ``train``, or the only one there is, if None.
        target_dataset: The target dataset.
        target_split: Its split; the only one there is if None.
        target_size: Instead of ``target_dataset``: this many rows are taken out of the pool.
        eval_dataset: What to evaluate on, if anything.
        eval_split: Its split; the only one there is if None.
        eval_size: Instead of ``eval_dataset``: this many rows are taken out of the pool.
        streaming: Read the pool as a stream. The other two are read as a whole.
        text_column: Column of the text; ``text`` if None and there is no chat.
        messages_column: Column of chats, lists of ``{"role", "content"}``, of which the assistant's turns are trained on;
            ``messages`` if None, if there is such a column, and ``text_column`` is None.
        image_column: Column of the images.
        label_column: Column of the labels, for classification.
        max_length: Tokens of a row, at most; longer ones are cut off.
        pack: Join texts and cut them into rows of ``max_length`` tokens.

    Raises:
        ValueError: If a dataset is missing, or given in two ways.
    """

    train_dataset: str | None = field(
        default=None, metadata={"help": "The pool: dataset id[:config], file or folder."}
    )
    train_split: str | None = field(default=None, metadata={"help": "Its split; train if not set."})
    target_dataset: str | None = field(
        default=None, metadata={"help": "What good means: dataset id[:config], file or folder."}
    )
    target_split: str | None = field(default=None, metadata={"help": "Its split; the only one if not set."})
    target_size: int | None = field(
        default=None, metadata={"help": "Without a target dataset: rows to take out of the pool for it."}
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "What to evaluate on: dataset id[:config], file or folder."}
    )
    eval_split: str | None = field(default=None, metadata={"help": "Its split; the only one if not set."})
    eval_size: int | None = field(
        default=None, metadata={"help": "Without an eval dataset: rows to take out of the pool for it."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read the pool as a stream."})
    text_column: str | None = field(default=None, metadata={"help": "Column of the text; text if not set."})
    messages_column: str | None = field(
        default=None,
        metadata={"help": "Column of chats, whose assistant turns are trained on; messages if there is one."},
    )
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels."})
    max_length: int = field(default=1024, metadata={"help": "Tokens of a row, at most."})
    pack: bool = field(default=False, metadata={"help": "Join texts and cut them into rows of max_length tokens."})

    def __post_init__(self) -> None:
        check_types(self)
        if not self.train_dataset:
            raise ValueError("`train_dataset` is not set: give a dataset id, a file or a folder.")
        for name in ("target", "eval"):
            size = getattr(self, f"{name}_size")
            if size is not None and getattr(self, f"{name}_dataset"):
                raise ValueError(
                    f"`{name}_size` takes rows out of `train_dataset`, and `{name}_dataset` is given too. Drop one of them."
                )
            if size is not None and size < 1:
                raise ValueError(f"`{name}_size` must be at least 1, got {size}.")
        if self.max_length < 2:
            raise ValueError(f"`max_length` must be at least 2, got {self.max_length}.")
        if self.text_column and self.messages_column:
            raise ValueError("`text_column` and `messages_column` are both set. Drop one: a row is a text or a chat.")


@dataclass
class RunArguments:
    """What to do, and with the result.

    Args:
        dry_run: Print the settings, the sizes of batches, cost and memory; train nothing and write nothing.
        push_subset: Dataset repository to upload the selected subset to.
    """

    dry_run: bool = field(default=False, metadata={"help": "Print settings, batches, cost and memory; train nothing."})
    push_subset: str | None = field(
        default=None, metadata={"help": "Dataset repository (namespace/name) to upload the selected subset to."}
    )

    def __post_init__(self) -> None:
        check_types(self)


@dataclass
class SubsetRunArguments(RunArguments):
    """The same for methods that rank or weight samples.

    Args:
        subset_fraction: Share of the samples that the saved subset keeps, of those that the run has seen.

    Raises:
        ValueError: If it is out of range.
    """

    subset_fraction: float = field(
        default=0.5, metadata={"help": "Share of the samples seen that the saved subset keeps."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.subset_fraction <= 1:
            raise ValueError(f"`subset_fraction` must be in (0, 1], got {self.subset_fraction}.")


@dataclass
class BladeRunArguments(SubsetRunArguments):
    """The same for BLADE.

    Args:
        trl: Train with TRL's ``SFTTrainer`` behind BLADE.
        reference_model: For ``reference: static``, the frozen model to compare with: id on the Hub or local folder.

    Raises:
        ValueError: If trl is asked for and not installed.
    """

    trl: bool = field(default=False, metadata={"help": "Train with TRL's SFTTrainer behind BLADE."})
    reference_model: str | None = field(
        default=None, metadata={"help": "For reference: static, the frozen model to compare with: id or local folder."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trl and importlib.util.find_spec("trl") is None:
            raise ValueError("`trl` needs the package trl, which is not installed: `pip install trl`, or drop `trl`.")


@dataclass
class MixtureRunArguments(SubsetRunArguments):
    """The same for mixtures.

    Args:
        mixture_file: Weights of the domains to train with, which are not learned then: the ``mixture.json`` that an earlier run
            wrote.
    """

    mixture_file: str | None = field(
        default=None,
        metadata={"help": "Train with the weights of an earlier run: the mixture.json that it wrote."},
    )


@dataclass
class CoresetRunArguments(RunArguments):
    """The same for coresets.

    Args:
        search_model: Model that is trained in the search instead of ``model``, for instance a smaller one: id on the Hub or local
            folder. It must read the same tokens or pixels.
    """

    search_model: str | None = field(
        default=None,
        metadata={"help": "Model to search with instead, a smaller one for instance: id or local folder."},
    )
