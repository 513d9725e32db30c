"""FastVideo's schemas, written down from its ``fastvideo/dataset/dataloader/schema.py``, not from ours."""

from __future__ import annotations

import pyarrow as pa


def _triplet(name: str) -> list[tuple[str, pa.DataType]]:
    return [(f"{name}_bytes", pa.binary()), (f"{name}_shape", pa.list_(pa.int64())), (f"{name}_dtype", pa.string())]


_METADATA = [
    ("file_name", pa.string()),
    ("caption", pa.string()),
    ("media_type", pa.string()),
    ("width", pa.int64()),
    ("height", pa.int64()),
    ("num_frames", pa.int64()),
    ("duration_sec", pa.float64()),
    ("fps", pa.float64()),
]
SCHEMAS = {
    "t2v": pa.schema([("id", pa.string()), *_triplet("vae_latent"), *_triplet("text_embedding"), *_METADATA]),
    "i2v": pa.schema(
        [
            ("id", pa.string()),
            *_triplet("vae_latent"),
            *_triplet("text_embedding"),
            *_triplet("clip_feature"),
            *_triplet("first_frame_latent"),
            *_triplet("pil_image"),
            *_METADATA,
        ]
    ),
    "text": pa.schema([("id", pa.string()), *_triplet("text_embedding"), ("caption", pa.string())]),
}
"""FastVideo's ``pyarrow_schema_t2v``, ``_i2v`` and ``_text_only``, column by column."""
