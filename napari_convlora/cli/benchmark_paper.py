"""``napari-convlora benchmark paper``: repeat the tables of the Conv-LoRA paper."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rich.console import Console
from rich.table import Table

from napari_convlora.config import DeviceName, HeadName, MethodConfig, ModelConfig
from napari_convlora.errors import ConvLoRAError, InputError
from napari_convlora.files import tables

if TYPE_CHECKING:
    from napari_convlora.benchmark.paper import Evaluated, PaperConfig, PaperData

# The engine imports torch, which takes seconds: `run` imports it, not --help.

_SCALES = tuple(range(1, 9))
_out = Console(soft_wrap=True, markup=False, highlight=False)


def add_paper_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    add("--data", required=True, type=Path, metavar="DIR", help="holds train, val and test.csv")
    add("--out", required=True, type=Path, metavar="DIR")
    add("--method", default="conv_lora", metavar="NAME")
    add("--backbone", default="vit_h", metavar="NAME|PATH")
    add("--head", choices=("class_tokens", "classification_branch"), help="of class ids")
    add("--task", choices=("binary", "multiclass"), help="default: by the number of label values")
    add("--ignore", type=int, metavar="ID", help="class id that loss and metric leave out")
    add("--size", type=_at_least(32), default=1024, metavar="PX", help="side of the square input")
    add("--rank", type=_at_least(1), default=3, metavar="R")
    add("--alpha", type=float, default=32.0, metavar="A")
    add("--fixed-gate", action="store_true", help="let the task train Conv-LoRA's gate")
    add("--fixed-structure-loss", action="store_true", help="weight the cross-entropy by edges too")
    add("--epochs", type=_at_least(1), default=30, metavar="N")
    add("--lr", type=float, default=1e-4, metavar="LR")
    add("--metric", choices=("s_measure", "iou", "ber", "miou"), help="chooses the best epoch")
    add("--seeds", nargs="+", type=_at_least(0), default=[1], metavar="S")
    add("--max-images", type=_at_least(1), metavar="N", help="per split, for a reduced run")
    add("--workers", type=_at_least(0), default=0, metavar="N", help="processes that read images")
    add("--no-native", action="store_true", help="score at --size only")
    add("--device", choices=get_args(DeviceName), default="auto")


def _at_least(low: int) -> Any:
    def parse(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {text}")
        return value

    parse.__name__ = "int"
    return parse


def run_paper(options: argparse.Namespace) -> int:
    """Train and test once per seed; after every seed all results so far are on disk."""
    import torch

    from napari_convlora.backbones import load_backbone
    from napari_convlora.benchmark import paper
    from napari_convlora.devices import choose_device
    from napari_convlora.files.atomic import make_folder
    from napari_convlora.model.iteration import Returning

    data, config = _data(options)
    model_config = _model_config(options, data)
    device = choose_device(options.device)
    backbone = load_backbone(options.backbone)
    make_folder(options.out)
    sizes = ("square",) if options.no_native else ("square", "native")
    results: dict[str, Any] = {
        "data": str(options.data.resolve()),
        "images": {"train": len(data.train), "val": len(data.val), "test": len(data.test)},
        "backbone": {"name": backbone.spec.name, "sha256": backbone.checkpoint_sha256},
        "model": asdict(model_config),
        "training": asdict(config) | {"device": str(device)},
        "seeds": {},
    }
    for seed in options.seeds:
        try:
            epochs = Returning(paper.train(backbone, model_config, data, config, seed, device))
            for epoch in epochs:
                _out.print(
                    f"seed {seed}, epoch {epoch.number} of {config.epochs}: loss {epoch.loss:.4f}, "
                    f"{config.metric} {epoch.score:.4f} (best {epoch.best:.4f}, "
                    f"epoch {epoch.best_epoch})"
                )
            trained = epochs.value
            found = {
                size: paper.evaluate_pairs(
                    trained.model, data.test, data.task, config, native=size == "native"
                )
                for size in sizes
            }
        except torch.OutOfMemoryError as error:
            raise ConvLoRAError(
                "The device ran out of memory; choose a smaller --size or backbone."
            ) from error
        adapter = paper.to_adapter(trained, data, config, seed)
        adapter.save(options.out / f"seed{seed}.safetensors")
        _write_rows(options.out / f"seed{seed}.csv", found)
        results["seeds"][str(seed)] = {
            "history": [asdict(epoch) for epoch in trained.history],
            "seconds": round(trained.seconds, 1),
            "test": {size: scored.summary for size, scored in found.items()},
        }
        results["summary"] = {
            size: paper.mean_and_error([run["test"][size] for run in results["seeds"].values()])
            for size in sizes
        }
        tables.write_json(options.out / "results.json", results)
    _out.print(_table(results["summary"], len(options.seeds)))
    return 0


def _data(options: argparse.Namespace) -> tuple[PaperData, PaperConfig]:
    """Read the tables, and settle what depends on the labels."""
    from napari_convlora.benchmark.paper import PaperConfig, PaperData
    from napari_convlora.benchmark.paper_data import SPLITS, find_task, read_split

    splits = {name: read_split(options.data, name, options.max_images) for name in SPLITS}
    binary = None if options.task is None else options.task == "binary"
    task, counts = find_task(splits["train"], binary, options.ignore)
    metric = options.metric or ("s_measure" if task.binary else "miou")
    if (metric == "miou") is task.binary:
        raise InputError(
            f"The metric {metric} does not fit these labels; use miou for class ids and "
            "another one for masks."
        )
    config = PaperConfig(
        size=options.size,
        epochs=options.epochs,
        lr=options.lr,
        metric=metric,
        edge_bce=options.fixed_structure_loss,
        workers=options.workers,
    )
    return PaperData(**splits, task=task, counts=counts), config


def _model_config(options: argparse.Namespace, data: PaperData) -> ModelConfig:
    from napari_convlora.peft import METHODS

    if options.method not in METHODS:
        raise InputError(f"Unknown method {options.method!r}; choose one of {', '.join(METHODS)}.")
    head: HeadName = "mask_token" if data.task.binary else options.head or "classification_branch"
    return ModelConfig(
        method=options.method,
        method_config=MethodConfig(
            rank=options.rank, alpha=options.alpha, scales=_SCALES, faithful=not options.fixed_gate
        ),
        first_block=0,
        head=head,
        queries=max(ModelConfig.queries, data.task.n_classes),
        detail=False,
        plain_start=head != "class_tokens",
    )


def _write_rows(path: Path, found: dict[str, Evaluated]) -> None:
    """Write one line per image and size."""
    rows = [{"size": size} | row for size, scored in found.items() for row in scored.images]
    tables.write_csv(path, list(rows[0]), rows)


def _table(summary: dict[str, Any], runs: int) -> Table:
    table = Table("metric", *summary, title=f"mean and standard error of {runs} runs, in per cent")
    for name in summary["square"]:
        cells = []
        for size in summary:
            mean, error = summary[size][name]["mean"], summary[size][name]["standard_error"]
            cells.append(f"{100 * mean:.2f}" + ("" if error is None else f" ± {100 * error:.2f}"))
        table.add_row(name, *cells)
    return table
