"""Settings + this machine + the model's configs -> how to encode: what ``auto`` and 0 stand for, for which model."""

from __future__ import annotations

import dataclasses
import os

import torch

from streamprep import job
from streamprep.config import EncodeConfig
from streamprep.contract import LatentContract
from streamprep.encoders import EncodeOptions, open_encoder
from streamprep.errors import UserError
from streamprep.progress import count
from streamprep.ranks import this_rank
from streamprep.settings import EncodeSettings
from streamprep.storage import Store


def describe_model(config: EncodeSettings) -> LatentContract:
    """The contract but for its digests, from the model's configs alone.

    Raises:
        UserError: if the model is not known, or not one for the workload.
    """
    text_dtype = "float32" if config.text_dtype == "auto" else config.text_dtype
    settled = dataclasses.replace(config, device="cpu", text_dtype=text_dtype)
    return open_encoder(config.model_path, dataclasses.replace(options_of(settled), digest="none")).contract


def settle(config: EncodeConfig, out: Store) -> EncodeConfig:
    """Put what this machine decides in the place of ``auto`` and 0, and tell torch."""
    device = _device(config.device)
    is_gpu = device.type == "cuda"
    threads = _encode_threads(config, out)
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    text_dtype = {"auto": "bfloat16" if is_gpu else "float32"}.get(config.text_dtype, config.text_dtype)
    return dataclasses.replace(
        config,
        device=str(device),
        encode_threads=threads,
        text_dtype=text_dtype,
        allow_tf32=config.allow_tf32 and is_gpu,
    )


def options_of(config: EncodeSettings) -> EncodeOptions:
    """How the model is to encode, of settled settings."""
    return EncodeOptions(
        workload=config.workload_type,
        device=torch.device(config.device),
        vae_dtype=config.vae_dtype,
        text_dtype=config.text_dtype,
        allow_tf32=config.allow_tf32,
        posterior=config.posterior,
        clean_captions=config.clean_captions,
        text_batch_size=config.text_batch_size,
        offload_text_encoder=config.offload_text_encoder,
        digest="full" if config.full_digest else "ends",
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: cpu or cuda is needed")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch {torch.__version__} finds no GPU")
    return _own_gpu() if name == "cuda" else device


def _own_gpu() -> torch.device:
    """Of several ranks on a machine each has its own; a launcher may show each only its own."""
    rank, num_gpus = this_rank(), torch.cuda.device_count()
    if rank.local_world_size == 1 or (num_gpus == 1 and "CUDA_VISIBLE_DEVICES" in os.environ):
        return torch.device("cuda")
    if rank.local_number >= num_gpus:
        raise UserError(
            f"this machine has {count(num_gpus, 'GPU')} and {rank.local_world_size} ranks: start one for each GPU, or "
            "say --device cpu"
        )
    torch.cuda.set_device(rank.local_number)
    return torch.device("cuda", rank.local_number)


def _encode_threads(config: EncodeConfig, out: Store) -> int:
    """As asked for; else as the job began, as threads may change the last bits; else this rank's share of the cores."""
    if config.encode_threads:
        return config.encode_threads
    if out.exists(job.PLAN):
        began = job.open_job(out).plan.fingerprint.get("model", {}).get("encode_threads")
        if began:
            return int(began)
    return max(1, len(os.sched_getaffinity(0)) // this_rank().local_world_size)
