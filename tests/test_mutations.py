"""Would the tests notice? Mistakes that people really make in this kind of program, made on purpose.

Each is made in a copy of the source, and the copy encodes the same few clips. Then either the command itself must
refuse (its self-check, or the check of every sample's first frame), or `reference.compare` must name exactly the
columns that the mistake spoils. The text before the change must be in its file once, so that the list stays current.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from forks import Forks, Process
from quick_cases import mostly_slow
from reference import Geometry, Row, compare, encode_dataset, read_rows

pytest_plugins = ["jobs"]
pytestmark = pytest.mark.usefixtures("one_thread")

GEOMETRY = Geometry(height=32, width=48, num_frames=5, train_fps=10)
WORKLOADS = {"2.1-t2v": "t2v", "2.1-i2v": "i2v"}
CAPTIONS = {
    "square.mp4": "  A  square   &amp; a circle &lt;3, doesn\u00e2\u20ac\u2122t it?\n",
    "tall.mp4": "A red circle moves from left to right over a blue and white checkerboard. " * 20,
    "wide.mp4": "A dog runs.",
}
SIZES = {"square.mp4": (100, 100), "tall.mp4": (80, 144), "wide.mp4": (160, 96)}
PICTURE = {"vae_latent", "first_frame_latent", "clip_feature"}
NORMALISED = """(
            (posterior.mean - torch.tensor(self._vae.config.latents_mean).view(1, -1, 1, 1, 1))
            / torch.tensor(self._vae.config.latents_std).view(1, -1, 1, 1, 1)
        )"""
WAN, CLIP, UMT5 = (f"streamprep/encoders/{name}.py" for name in ("wan", "_clip_vision", "_umt5"))
SAMPLING, CROP, TORCHCODEC, PLAN = (
    f"streamprep/{name}.py" for name in ("sampling", "crop", "decode_torchcodec", "plan")
)
EXPORTER = "exporters/fastvideo.py"


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A change of one place in one file."""

    name: str
    file: str
    before: str
    after: str
    found: set[str] | str
    """The columns it spoils; or "refused: ..." with what the command itself says about it."""
    variant: str = "2.1-i2v"


MISTAKES = [
    # Which frames
    Mistake(
        name="every frame is the one after",
        file=SAMPLING,
        before="return np.arange(0, num_frames",
        after="return np.arange(1, num_frames",
        found=PICTURE,
    ),
    Mistake(
        name="frame numbers are rounded to the nearest",
        file=SAMPLING,
        before="return np.arange(0, num_frames, fps / train_fps)",
        after="return np.arange(0, num_frames, fps / train_fps).round()",
        found={"vae_latent"},  # the first frame is the same
    ),
    Mistake(
        name="the source's frames are taken as they come",
        file=SAMPLING,
        before="return np.arange(0, num_frames, fps / train_fps)",
        after="return np.arange(0, num_frames)",
        found={"vae_latent"},
    ),
    # Which pixels
    Mistake(
        name="not cropped but squeezed",
        file=CROP,
        before="cropped = frames_TCHW[..., top : top + crop_height, left : left + crop_width]",
        after="cropped = frames_TCHW",
        found=PICTURE,
    ),
    Mistake(
        name="cropped at the top left",
        file=CROP,
        before="    return top, left, crop_height, crop_width",
        after="    return 0, 0, crop_height, crop_width",
        found=PICTURE,
    ),
    Mistake(
        name="the crop's size is rounded up",
        file=CROP,
        before="max(1, int(source_width * ratio)), source_width",
        after="max(1, round(source_width * ratio)), source_width",
        found=PICTURE,
    ),
    Mistake(
        name="align_corners off",
        file=CROP,
        before="align_corners=True, antialias=True)",
        after="align_corners=False, antialias=True)",
        found=PICTURE,
    ),
    Mistake(
        name="antialias off",
        file=CROP,
        before="align_corners=True, antialias=True)",
        after="align_corners=True, antialias=False)",
        found=PICTURE,
    ),
    Mistake(
        name="bicubic",
        file=CROP,
        before='mode="bilinear"',
        after='mode="bicubic"',
        found=PICTURE,
    ),
    Mistake(
        name="resized in float",
        file=CROP,
        before="cropped = frames_TCHW[..., top : top + crop_height, left : left + crop_width]",
        after="cropped = frames_TCHW[..., top : top + crop_height, left : left + crop_width].float()",
        found=PICTURE,
    ),
    Mistake(
        name="BGR",
        file=TORCHCODEC,
        before="yield batch.data",
        after="yield batch.data.flip(-1)",
        found=PICTURE,
    ),
    Mistake(
        name="BGR for the VAE only",
        file=WAN,
        before="pixels: Tensor = frames.float()",
        after="pixels: Tensor = frames.flip(1).float()",
        found={"vae_latent", "first_frame_latent"},
    ),
    Mistake(
        name="pixels from 0 to 1",
        file=WAN,
        before="frames.float().div_(255.0).mul_(2.0).sub_(1.0)",
        after="frames.float().div_(255.0)",
        found={"vae_latent", "first_frame_latent"},
    ),
    Mistake(
        name="pixels from -1 to 0.992",
        file=WAN,
        before="frames.float().div_(255.0).mul_(2.0).sub_(1.0)",
        after="frames.float().div_(128.0).sub_(1.0)",
        found={"vae_latent", "first_frame_latent"},
    ),
    # What the VAE gives
    Mistake(
        name="vae_latent normalised",
        file=WAN,
        before='tensors["vae_latent"] = posterior.mean.float().cpu()',
        after=f'tensors["vae_latent"] = {NORMALISED}.float().cpu()',
        found={"vae_latent"},
        variant="2.1-t2v",
    ),
    Mistake(
        name="vae_latent normalised, for image to video",
        file=WAN,
        before='tensors["vae_latent"] = posterior.mean.float().cpu()',
        after=f'tensors["vae_latent"] = {NORMALISED}.float().cpu()',
        found="refused: fails its self-check.*begins with another frame than its video latent",
    ),
    Mistake(
        name="vae_latent a sample of the posterior",
        file=WAN,
        before='tensors["vae_latent"] = posterior.mean.float().cpu()',
        after='tensors["vae_latent"] = posterior.sample().float().cpu()',
        found={"vae_latent"},
        variant="2.1-t2v",
    ),
    Mistake(
        name="vae_latent a sample of the posterior, for image to video",
        file=WAN,
        before='tensors["vae_latent"] = posterior.mean.float().cpu()',
        after='tensors["vae_latent"] = posterior.sample().float().cpu()',
        found="refused: fails its self-check.*begins with another frame than its video latent",
    ),
    Mistake(
        name="vae_latent rounded to bfloat16",
        file=WAN,
        before='tensors["vae_latent"] = posterior.mean.float().cpu()',
        after='tensors["vae_latent"] = posterior.mean.bfloat16().float().cpu()',
        found={"vae_latent"},
        variant="2.1-t2v",
    ),
    Mistake(
        name="every clip of a batch gets the first one's tensors",
        file=WAN,
        before="values[row].clone() for name, values in",
        after="values[0].clone() for name, values in",
        found="refused: fails its self-check.*vae_latent is the same for two clips",
    ),
    # The conditioning latent
    Mistake(
        name="first_frame_latent not normalised",
        file=WAN,
        before="return ((latents - mean) * (1.0 / std)).cpu()",
        after="return latents.cpu()",
        found="refused: fails its self-check.*begins with another frame than its video latent",
    ),
    Mistake(
        name="first_frame_latent multiplied by its deviation",
        file=WAN,
        before="return ((latents - mean) * (1.0 / std)).cpu()",
        after="return ((latents - mean) * std).cpu()",
        found="refused: fails its self-check.*begins with another frame than its video latent",
    ),
    Mistake(
        name="conditioning frames of -1, black, instead of 0",
        file=WAN,
        before="pixels_BCTHW[:, :, 1:] = 0.0",
        after="pixels_BCTHW[:, :, 1:] = -1.0",
        found={"first_frame_latent"},
    ),
    Mistake(
        name="conditioning on a still picture",
        file=WAN,
        before="pixels_BCTHW[:, :, 1:] = 0.0",
        after="pixels_BCTHW[:, :, 1:] = pixels_BCTHW[:, :, :1]",
        found={"first_frame_latent"},
    ),
    Mistake(
        name="conditioning on the whole clip",
        file=WAN,
        before="pixels_BCTHW[:, :, 1:] = 0.0",
        after="pass",
        found={"first_frame_latent"},
    ),
    Mistake(
        name="conditioning on the last frame",
        file=WAN,
        before="pixels_BCTHW[:, :, 1:] = 0.0",
        after="pixels_BCTHW[:, :, :1], pixels_BCTHW[:, :, 1:] = pixels_BCTHW[:, :, -1:].clone(), 0.0",
        found="refused: fails its self-check.*begins with another frame than its video latent",
    ),
    # The image's features
    Mistake(
        name="CLIP's last layer",
        file=CLIP,
        before="output_hidden_states=True).hidden_states[-2]",
        after="output_hidden_states=True).hidden_states[-1]",
        found={"clip_feature"},
    ),
    Mistake(
        name="CLIP's pooled output",
        file=CLIP,
        before="output_hidden_states=True).hidden_states[-2]",
        after="output_hidden_states=True).pooler_output",
        found="refused: fails its self-check.*clip_feature is of shape",
    ),
    Mistake(
        name="CLIP sees the last frame",
        file=WAN,
        before="self._image.encode(batch.frames[:, 0])",
        after="self._image.encode(batch.frames[:, -1])",
        found={"clip_feature"},
    ),
    Mistake(
        name="CLIP sees the picture squeezed to a square instead of cropped",
        file=CLIP,
        before="Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())",
        after="Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()).resize((224, 224))",
        found={"clip_feature"},
    ),
    Mistake(
        name="CLIP sees BGR",
        file=CLIP,
        before="Image.fromarray(frame.permute(1, 2, 0)",
        after="Image.fromarray(frame.flip(0).permute(1, 2, 0)",
        found={"clip_feature"},
    ),
    Mistake(
        name="CLIP's picture is not normalised",
        file=CLIP,
        before='self._processor(images=images, return_tensors="pt")',
        after='self._processor(images=images, return_tensors="pt", do_normalize=False)',
        found={"clip_feature"},
    ),
    # Captions
    Mistake(
        name="captions are not cleaned",
        file=UMT5,
        before="return str(prompt_clean(caption))",
        after="return caption",
        found={"text_embedding"},
    ),
    Mistake(
        name="at most 226 tokens, the pipeline's default",
        file=UMT5,
        before="MAX_LENGTH = 512",
        after="MAX_LENGTH = 226",
        found={"text_embedding"},
    ),
    Mistake(
        name="zeros up to 512 tokens are stored",
        file=UMT5,
        before="return [states[row, : len(row_tokens)].clone() for row, row_tokens in enumerate(tokens)]",
        after="return list(torch.nn.functional.pad(states * mask[..., None], (0, 0, 0, 512 - longest)))",
        found={"text_embedding"},
    ),
    Mistake(
        name="embeddings are as long as the longest caption beside them",
        file=UMT5,
        before="states[row, : len(row_tokens)].clone()",
        after="states[row].clone()",
        found="refused: fails its self-check.*text_embedding changes with the other prompts of its batch",
    ),
    Mistake(
        name="padded to 512 tokens without a mask, then cut",
        file=UMT5,
        before="""        longest = max(map(len, tokens))
        ids = torch.full((len(tokens), longest), self._tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
""",
        after="""        ids = torch.full((len(tokens), 512), self._tokenizer.pad_token_id)
        mask = torch.ones_like(ids)
""",
        found={"text_embedding"},
    ),
    Mistake(
        name="no attention mask",
        file=UMT5,
        before="mask.to(self._device)",
        after="None",
        found="refused: fails its self-check.*text_embedding changes with the other prompts of its batch",
    ),
    Mistake(
        name="no end-of-sequence token",
        file=UMT5,
        before="add_special_tokens=True",
        after="add_special_tokens=False",
        found="refused: the end-of-sequence token 1 as the last",
    ),
    Mistake(
        name="embeddings in the order of their length",
        file=UMT5,
        before="return [embedded[text] for text in texts]",
        after="return [embedded[text] for text in by_length]",
        found={"text_embedding"},
    ),
    Mistake(
        name="text in bfloat16",
        file=UMT5,
        before=".last_hidden_state.float().cpu()",
        after=".last_hidden_state.bfloat16().float().cpu()",
        found={"text_embedding"},
    ),
    # Columns
    Mistake(
        name="the caption column holds what the tokenizer should see",
        file=PLAN,
        before="caption=caption, prompt=prompt",
        after='caption=" ".join(caption.split()), prompt=prompt',
        found={"caption"},
    ),
    Mistake(
        name="width and height swapped",
        file=EXPORTER,
        before='"width": [clip.width],\n            "height": [clip.height],',
        after='"width": [clip.height],\n            "height": [clip.width],',
        found={"width", "height"},
    ),
    Mistake(
        name="frames are counted in pixels' time",
        file=EXPORTER,
        before='[arrays["vae_latent"].shape[1]]',
        after="[clip.num_frames]",
        found={"num_frames"},
    ),
    Mistake(
        name="the rate is that of the sampled frames",
        file=EXPORTER,
        before='"fps": [clip.source_fps]',
        after='"fps": [clip.train_fps]',
        found={"fps"},
    ),
    Mistake(
        name="tensors are rounded to half precision",
        file=EXPORTER,
        before="np.ascontiguousarray(sample.tensors[name].float().numpy())",
        after="np.ascontiguousarray(sample.tensors[name].half().float().numpy())",
        found={*PICTURE, "text_embedding"},
    ),
]


@dataclass(frozen=True)
class Trial:
    """What a copy of the source did."""

    process: Process
    differences: list[str]

    @property
    def columns(self) -> set[str]:
        """Those that differ in any row."""
        return {line.partition(": ")[0].rpartition(" ")[2] for line in self.differences}


@pytest.fixture(scope="module")
def dataset(make_video: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips that move, are to be cropped and made smaller, at another rate; captions to be cleaned and cut."""
    root = tmp_path_factory.mktemp("dataset")
    for number, (name, size) in enumerate(SIZES.items()):
        make_video(root / "videos" / name, size=size, fps=16, num_frames=10, seed=number)
    (root / "videos2caption.json").write_text(
        json.dumps([{"path": name, "cap": caption} for name, caption in CAPTIONS.items()])
    )
    return root


@pytest.fixture(scope="module")
def packed(dataset: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset's shards."""
    shards = tmp_path_factory.mktemp("packed") / "shards"
    process = forks.run("pack", dataset, shards, "--num-workers", 1)
    assert process.code == 0, process.output
    return shards


@pytest.fixture(scope="module")
def reference(dataset: Path, tiny_models: Callable[[str], Path]) -> Callable[[str], dict[str, Row]]:
    """``reference(variant)``: the rows that are right."""

    @functools.cache
    def make(variant: str) -> dict[str, Row]:
        return encode_dataset(dataset, tiny_models(variant), workload=WORKLOADS[variant], geometry=GEOMETRY)

    return make


@pytest.fixture
def encode(
    packed: Path,
    tiny_models: Callable[[str], Path],
    reference: Callable[[str], dict[str, Row]],
    forks: Forks,
    repo_root: Path,
    tmp_path: Path,
) -> Callable[..., Trial]:
    """``encode(variant, file, text)``: with a copy of the source in which the file has that text."""

    def run(variant: str, file: str | None = None, text: str = "") -> Trial:
        for package in ("streamprep", "exporters"):
            shutil.copytree(repo_root / package, tmp_path / "source" / package)
        if file is not None:
            path = tmp_path / "source" / file
            path.write_text(text)
            shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)  # it goes by whole seconds
        process = forks.run(
            *("encode", packed, tmp_path / "out", "--model-path", tiny_models(variant)),
            *("--workload-type", WORKLOADS[variant], *GEOMETRY.flags, "--encode-threads", 1, "--serial"),
            source=tmp_path / "source",
        )
        done = process.code == 0
        return Trial(process, compare(read_rows(tmp_path / "out"), reference(variant)) if done else [])

    return run


@pytest.mark.parametrize("variant", WORKLOADS)
def test_a_copy_of_the_source_gives_what_the_reference_gives(variant: str, encode: Callable[..., Trial]) -> None:
    trial = encode(variant)
    assert trial.process.code == 0, trial.process.output
    assert trial.differences == []


def test_it_is_the_copy_that_runs(encode: Callable[..., Trial]) -> None:
    trial = encode("2.1-t2v", "streamprep/selfcheck.py", "raise SystemExit('this is the copy')")
    assert (trial.process.code, trial.process.output) != (0, "")
    assert "this is the copy" in trial.process.output


@pytest.mark.parametrize("mistake", mostly_slow(MISTAKES, quick=MISTAKES[::3]), ids=lambda mistake: mistake.name)
def test_a_mistake_is_noticed(mistake: Mistake, encode: Callable[..., Trial], repo_root: Path) -> None:
    text = (repo_root / mistake.file).read_text()
    assert text.count(mistake.before) == 1
    trial = encode(mistake.variant, mistake.file, text.replace(mistake.before, mistake.after))
    if isinstance(mistake.found, str):
        assert trial.process.code == 2, trial.differences
        assert re.search(mistake.found.removeprefix("refused: "), trial.process.output), trial.process.output
    else:
        assert trial.process.code == 0, trial.process.output
        assert trial.columns == mistake.found, trial.differences
