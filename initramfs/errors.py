"""What can go wrong while the machine is set up; each is one line for the administrator: what, where, what to do."""

from __future__ import annotations

from capture.errors import CaptureError


class ImageError(CaptureError):
    """The image cannot be built."""


class ModuleNotThereError(ImageError):
    """A kernel module that the image needs is neither a file of the module tree nor built in."""


class ToolError(CaptureError):
    """A program that we need is missing, or failed."""


class KexecError(CaptureError):
    """The machine cannot be armed."""


class MeasureError(CaptureError):
    """How much memory a capture kernel needs cannot be measured here."""


class NotSavedError(MeasureError):
    """A guest's crash was not saved whole, or its capture kernel could not be loaded: more memory may help."""


class NotifyError(CaptureError):
    """Somebody who was to be told of a crash could not be."""


class StateError(CaptureError):
    """What has to be remembered over a reboot cannot be."""


class CollectError(CaptureError):
    """What was saved cannot be taken off a raw partition."""
