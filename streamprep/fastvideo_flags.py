"""FastVideo's flags, and what each means here: the tables of `streamprep.fastvideo`.

The names are those of FastVideo's ``fastvideo_args.py``, ``configs/configs.py``, ``configs/pipelines/base.py`` and
``pipelines/preprocess/v1_preprocess.py``, with underscores and in lower case.
"""

from __future__ import annotations

from collections.abc import Mapping

HABITS = {
    "max_height": "480",
    "max_width": "848",
    "num_frames": "163",
    "train_fps": "30",
    "video_length_tolerance_range": "2.0",
    "samples_per_file": "64",
    "preprocess_video_batch_size": "2",
    "seed": "42",
    "clean_captions": "false",
    "text_dtype": "float32",
}
"""What FastVideo does where nothing else is said, and where it decides what is encoded, or dropped."""

SAME = (
    "num_frames",
    "max_height",
    "max_width",
    "train_fps",
    "video_length_tolerance_range",
    "speed_factor",
    "drop_short_ratio",
    "training_cfg_rate",
    "seed",
    "samples_per_file",
    "preprocess_video_batch_size",
    "dataloader_num_workers",
)
"""Flags of the same name and meaning in ``streamprep run``."""

_UNUSED = "FastVideo itself never uses it"
_TRANSFORMER = "it is about the transformer, which preprocessing never loads"
_RANKS = "each rank has the whole model and takes shards as it goes: start as many as you have GPUs"
_MEMORY = "only what encodes is loaded, and stays on the GPU; --offload-text-encoder makes room"
_INFERENCE = "it is about generating videos"
_TILING = "videos are encoded whole, which is what tiling approximates"
_NEVER_COMPILED = "nothing is compiled"

IDLE: Mapping[str, str] = {
    "flush_frequency": "each shard is written as soon as it is encoded, and nothing is lost at the end",
    "mode": "this command only preprocesses",
    "num_latent_t": _UNUSED,
    "group_frame": _UNUSED,
    "group_resolution": f"{_UNUSED}; --buckets groups by size",
    "use_image_num": _UNUSED,
    "text_encoder_name": f"{_UNUSED}; the model's own text encoder is loaded",
    "text_max_length": "FastVideo's embeddings do not follow it either: the text encoder's own limit does, 512 for Wan",
    "model_type": "the model's model_index.json says what it is",
    "validation_dataset_file": "trainers read it, preprocessing does not; --validation-split makes one",
    "inference_mode": "this command only preprocesses",
    "trust_remote_code": "no code of a model's repository is ever run",
    "distributed_executor_backend": _RANKS,
    "tp_size": _RANKS,
    "sp_size": _RANKS,
    "hsdp_replicate_dim": _RANKS,
    "hsdp_shard_dim": _RANKS,
    "dist_timeout": "ranks never wait for each other in a collective",
    "master_port": "ranks find each other by what torchrun says",
    "output_type": _INFERENCE,
    "prompt_txt": _INFERENCE,
    "attention_backend": _TRANSFORMER,
    "lora_path": _TRANSFORMER,
    "lora_nickname": _TRANSFORMER,
    "lora_target_modules": _TRANSFORMER,
    "enable_bsa": _TRANSFORMER,
    "bsa_sparsity": _TRANSFORMER,
    "bsa_cdf_threshold": _TRANSFORMER,
    "bsa_chunk_q": _TRANSFORMER,
    "bsa_chunk_k": _TRANSFORMER,
    "vsa_sparsity": _TRANSFORMER,
    "vsa_tile_size": _TRANSFORMER,
    "moba_config_path": _TRANSFORMER,
    "flow_shift": _TRANSFORMER,
    "embedded_cfg_scale": _TRANSFORMER,
    "dit_precision": _TRANSFORMER,
    "dmd_denoising_steps": _TRANSFORMER,
    "dit_cpu_offload": _TRANSFORMER,
    "dit_layerwise_offload": _TRANSFORMER,
    "use_fsdp_inference": _TRANSFORMER,
    "override_transformer_cls_name": _TRANSFORMER,
    "init_weights_from_safetensors": _TRANSFORMER,
    "init_weights_from_safetensors_2": _TRANSFORMER,
    "transformer_quant": _TRANSFORMER,
    "override_pipeline_cls_name": "the model's model_index.json says what it is",
    "enable_torch_compile": _NEVER_COMPILED,
    "torch_compile_kwargs": _NEVER_COMPILED,
    "vae_cpu_offload": _MEMORY,
    "image_encoder_cpu_offload": _MEMORY,
    "pin_cpu_memory": "frames are pinned whenever there is a GPU",
    "disable_autocast": "there is no autocast: each component runs in the dtype that it is said to",
    "enable_stage_verification": "every job checks its model before the first sample",
    "vae_decode_precision": "nothing is decoded",
    "vae_tiling": _TILING,
    "vae_sp": _RANKS,
    "image_encoder_precision": "CLIP runs in float32, as in FastVideo's preprocessing",
    "ltx2_vae_tiling": _TILING,
    "ltx2_vae_spatial_tile_size_in_pixels": _TILING,
    "ltx2_vae_spatial_tile_overlap_in_pixels": _TILING,
    "ltx2_vae_temporal_tile_size_in_frames": _TILING,
    "ltx2_vae_temporal_tile_overlap_in_frames": _TILING,
    "ltx2_initial_latent_path": _INFERENCE,
}
"""FastVideo's flags that do nothing here -> why."""
IDLE_GROUPS = {"vae_config.": _TILING, "dit_config.": _TRANSFORMER}
"""Prefixes of more of them."""

REFUSED: Mapping[str, str] = {
    "override_text_encoder_safetensors": "other weights of the text encoder: put them into the model's folder",
    "override_text_encoder_quant": "a quantised text encoder gives other embeddings: leave it out",
    "pipeline_config_path": "a pipeline's config file is not read: give what it says as flags",
    "revision": "no revision is chosen here: download it (`hf download ORG/NAME --revision ...`) and give the folder",
}
"""FastVideo's flags that would change what is encoded, and are not heard -> what to do."""

TASKS = {"t2v": "t2v", "i2v": "i2v", "text_only": "text"}
"""``--preprocess_task`` -> ``--workload-type``."""
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
