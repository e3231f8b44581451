"""The form of advanced settings, and what it says in the engine's terms."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from magicgui.widgets import CheckBox, ComboBox, FloatSpinBox, SpinBox
from superqt.utils import signals_blocked

from napari_convlora.config import (
    DeviceName,
    HeadName,
    MethodName,
    ModelConfig,
    PresetName,
    TrainConfig,
)
from napari_convlora.widget.form import Form

_PREVIEW_SECONDS = 4.0


class SettingsForm:
    """Method, preset, limits, device: everything that has a sensible default.

    Attributes
    ----------
    model, train
        Settings that the form does not show are taken from these.
    widgets
        One for each setting that is shown.
    native
        The form to lay out.
    """

    def __init__(self) -> None:
        self.model, self.train = ModelConfig(), TrainConfig()
        self.method, self.head, self.detail = _model_widgets(self.model)
        self.preset, self.keep_uncorrected, self.seed, self.device = _train_widgets(self.train)
        self.max_steps, self.max_minutes, self.preview_seconds = _limit_widgets(self.train)
        self.widgets = (
            self.method,
            self.preset,
            self.head,
            self.detail,
            self.keep_uncorrected,
            self.max_steps,
            self.max_minutes,
            self.preview_seconds,
            self.seed,
            self.device,
        )
        self.native = Form(self.widgets)

    def show(self, model: ModelConfig, train: TrainConfig) -> None:
        """Take over these settings, those that the form does not show as well."""
        self.model, self.train = model, train
        for name in ("method", "head", "detail"):
            getattr(self, name).value = getattr(model, name)
        for name in ("preset", "device", "keep_uncorrected"):
            getattr(self, name).value = getattr(train, name)
        for name in ("max_steps", "seed"):
            box = getattr(self, name)
            # These boxes would take the keyboard from the canvas, even while they are hidden.
            with signals_blocked(box.native.lineEdit()):
                box.value = getattr(train, name)
        self.max_minutes.value = train.max_minutes or 0
        self.preview_seconds.value = train.preview_seconds or 0

    def model_config(self) -> ModelConfig:
        """Return what the next round trains."""
        return replace(
            self.model,
            method=self.method.value,
            head=self.head.value,
            detail=self.detail.value,
        )

    def train_config(self) -> TrainConfig:
        """Return how the next round trains."""
        return replace(
            self.train,
            preset=self.preset.value,
            keep_uncorrected=self.keep_uncorrected.value,
            max_steps=self.max_steps.value,
            max_minutes=self.max_minutes.value or None,
            seed=self.seed.value,
            device=self.device.value,
            preview_seconds=self.preview_seconds.value or None,
        )


def _model_widgets(model: ModelConfig) -> tuple[ComboBox, ComboBox, CheckBox]:
    """Return what chooses method, head and detail branch."""
    method = ComboBox(
        label="Method",
        choices=get_args(MethodName),
        value=model.method,
        tooltip="What is trained inside the encoder; conv_lora is what this is made for.",
    )
    head = ComboBox(
        label="Head",
        choices=get_args(HeadName),
        value=model.head,
        tooltip="class_tokens for strokes; classification_branch for dense labels; "
        "mask_token for two classes.",
    )
    detail = CheckBox(
        label="Detail branch",
        value=model.detail,
        tooltip="Reads local filters and SAM's own features at every pixel: thin structure, "
        "and the first preview.",
    )
    detail.text = "at full resolution"  # magicgui warns if given along with a label
    return method, head, detail


def _train_widgets(train: TrainConfig) -> tuple[ComboBox, CheckBox, SpinBox, ComboBox]:
    """Return what chooses preset, hints, seed and device."""
    preset = ComboBox(
        label="Preset",
        choices=get_args(PresetName),
        value=train.preset,
        tooltip="fast adapts the last blocks; full every block, which takes longer.",
    )
    keep_uncorrected = CheckBox(
        label="Left uncorrected",
        value=train.keep_uncorrected,
        tooltip="Where little is painted, a round learns as well from what the installed one "
        "said and you left as it was. Off: from what is painted alone.",
    )
    keep_uncorrected.text = "counts as a hint"
    seed = SpinBox(
        label="Seed",
        min=0,
        max=2**31 - 1,
        value=train.seed,
        tooltip="Start of the random numbers: the same seed repeats a round.",
    )
    device = ComboBox(
        label="Device",
        choices=get_args(DeviceName),
        value=train.device,
        tooltip="Where to compute. auto takes a graphics card if there is one.",
    )
    return preset, keep_uncorrected, seed, device


def _limit_widgets(train: TrainConfig) -> tuple[SpinBox, FloatSpinBox, FloatSpinBox]:
    """Return what limits steps and minutes, and how often a preview comes."""
    max_steps = SpinBox(
        label="Steps, at most",
        min=1,
        max=100_000,
        value=train.max_steps,
        tooltip="Training steps of a round. It ends earlier when there is no more to gain.",
    )
    max_minutes = FloatSpinBox(
        label="Minutes, at most",
        min=0,
        max=10_000,
        step=1,
        value=train.max_minutes or 0,
        tooltip="Minutes that the steps of a round may take; 0 sets no limit.",
    )
    max_minutes.native.setSpecialValueText("no limit")
    preview_seconds = FloatSpinBox(
        label="Preview every (s)",
        min=0,
        max=3600,
        step=1,
        value=_PREVIEW_SECONDS if train.preview_seconds is None else train.preview_seconds,
        tooltip="Seconds between refreshes of the prediction while training; 0 is never.",
    )
    preview_seconds.native.setSpecialValueText("never")
    return max_steps, max_minutes, preview_seconds
