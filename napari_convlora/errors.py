"""Errors that a user can cause: each is one sentence that names the remedy."""

from __future__ import annotations


class ConvLoRAError(Exception):
    """Base of every error whose message is one sentence meant for the user."""


class WeightsError(ConvLoRAError):
    """A checkpoint is absent, damaged or of an unknown architecture."""


class AdapterError(ConvLoRAError):
    """An adapter file is damaged, too new, or belongs to another backbone."""


class InputError(ConvLoRAError):
    """An image, label image or setting cannot be used as given."""
