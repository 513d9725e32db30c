"""Loading one component of a diffusers model, with nothing left to chance."""

from __future__ import annotations

import sys
from typing import Any

import torch

from streamprep.errors import UserError
from streamprep.models import ModelFolder
from streamprep.out_of_memory import loading


def load_component(model: ModelFolder, kind: Any, component: str, *, device: torch.device, **dtype: torch.dtype) -> Any:
    """One component, ready to encode.

    For weights that its files lack, the libraries would only warn and draw random ones.

    Args:
        model: The folder.
        kind: A diffusers or transformers class.
        component: Its sub-folder.
        device: Where to put it.
        **dtype: ``torch_dtype`` for diffusers, ``dtype`` for transformers.

    Raises:
        UserError: if weights are missing, or of another shape than the config says.
        OutOfMemory: if the device has no room for them.
    """
    _be_quiet()
    try:
        module, report = kind.from_pretrained(
            model.path, subfolder=component, use_safetensors=True, output_loading_info=True, **dtype
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{model.path / component} cannot be loaded as a {kind.__name__}: {reason}") from error
    if lacking := sorted(report["missing_keys"]):
        raise UserError(
            f"{model.path / component} lacks {len(lacking)} weights of a {kind.__name__}, the first is "
            f"{lacking[0]}: get the model again"
        )
    with loading(f"{model.path / component}"):
        return module.to(device).eval().requires_grad_(False)


def load_preprocessor(model: ModelFolder, component: str) -> Any:
    """A tokenizer or an image processor.

    Args:
        model: The folder.
        component: Its sub-folder.

    Raises:
        UserError: if it cannot be loaded.
    """
    kind = transformers_class(model, component)
    try:
        return kind.from_pretrained(model.path / component)
    except Exception as error:  # tokenizers raises no narrower one of a file that it cannot read
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"{model.path / component} cannot be loaded as a {kind.__name__}: {reason}") from error


def transformers_class(model: ModelFolder, component: str) -> Any:
    """The class that ``model_index.json`` names for a component, which is the one the pipeline loads.

    Without torchvision, transformers gives another class for some names (``CLIPImageProcessorPil``), as to pipelines;
    it would say so at every start, and here the contract does.

    Raises:
        UserError: if it names none that transformers has.
    """
    import transformers
    from transformers.utils import logging

    _, name = model.config("model_index.json").get(component) or (None, None)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        if not isinstance(name, str) or not hasattr(transformers, name):
            raise UserError(f"{model.name}: transformers {transformers.__version__} has no {component} {name!r}")
        return getattr(transformers, name)
    finally:
        logging.set_verbosity(verbosity)


def _be_quiet() -> None:
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
