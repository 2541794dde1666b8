"""The tasks of DataComp: names, main metrics and sizes as in the task list of the public evaluation code."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Kind(enum.Enum):
    """How a task is read and scored."""

    CLASSIFICATION = "classification"
    WILDS = "wilds"
    GROUPS = "groups"
    FACES = "faces"
    RETRIEVAL = "retrieval"
    WINOGAVIL = "winogavil"


@dataclass(frozen=True)
class Task:
    """One entry of the suite.

    Attributes:
        key: its key in the task list, "vtab/caltech101".
        name: its name in tables and results files, "Caltech-101".
        kind: how it is read and scored.
        main_metric: the metric that counts; None for the two sets of faces.
        size: number of images (of instances for WinoGAViL) of the whole set.
        classes: number of classes; None where there is no single list of classes.
    """

    key: str
    name: str
    kind: Kind
    main_metric: str | None
    size: int
    classes: int | None

    @property
    def folder(self) -> str:
        """The folder of the set in the data folder; for tables of the Hugging Face hub, the name of the data set there."""
        group, _, name = self.key.rpartition("/")
        if self.kind in (Kind.RETRIEVAL, Kind.WINOGAVIL):
            return name
        stem = name if group in ("", "fairness") else f"{group}-{name}"
        return f"wds_{stem}_test"


# fmt: off
_TASKS = (
    Task("vtab/caltech101", "Caltech-101", Kind.CLASSIFICATION, "mean_per_class_recall", 6_085, 102),
    Task("cifar10", "CIFAR-10", Kind.CLASSIFICATION, "acc1", 10_000, 10),
    Task("vtab/cifar100", "CIFAR-100", Kind.CLASSIFICATION, "acc1", 10_000, 100),
    Task("vtab/clevr_count_all", "CLEVR Counts", Kind.CLASSIFICATION, "acc1", 15_000, 8),
    Task("vtab/clevr_closest_object_distance", "CLEVR Distance", Kind.CLASSIFICATION, "acc1", 15_000, 6),
    Task("country211", "Country211", Kind.CLASSIFICATION, "acc1", 21_100, 211),
    Task("vtab/dtd", "Describable Textures", Kind.CLASSIFICATION, "acc1", 1_880, 47),
    Task("vtab/eurosat", "EuroSAT", Kind.CLASSIFICATION, "acc1", 5_400, 10),
    Task("fgvc_aircraft", "FGVC Aircraft", Kind.CLASSIFICATION, "mean_per_class_recall", 3_333, 100),
    Task("food101", "Food-101", Kind.CLASSIFICATION, "acc1", 25_250, 101),
    Task("gtsrb", "GTSRB", Kind.CLASSIFICATION, "acc1", 12_630, 43),
    Task("imagenet1k", "ImageNet 1k", Kind.CLASSIFICATION, "acc1", 50_000, 1000),
    Task("imagenet_sketch", "ImageNet Sketch", Kind.CLASSIFICATION, "acc1", 50_889, 1000),
    Task("imagenetv2", "ImageNet v2", Kind.CLASSIFICATION, "acc1", 10_000, 1000),
    Task("imagenet-a", "ImageNet-A", Kind.CLASSIFICATION, "acc1", 7_500, 200),
    Task("imagenet-o", "ImageNet-O", Kind.CLASSIFICATION, "acc1", 2_000, 200),
    Task("imagenet-r", "ImageNet-R", Kind.CLASSIFICATION, "acc1", 30_000, 200),
    Task("vtab/kitti_closest_vehicle_distance", "KITTI Vehicle Distance", Kind.CLASSIFICATION, "acc1", 711, 4),
    Task("mnist", "MNIST", Kind.CLASSIFICATION, "acc1", 10_000, 10),
    Task("objectnet", "ObjectNet", Kind.CLASSIFICATION, "acc1", 18_574, 113),
    Task("vtab/flowers", "Oxford Flowers-102", Kind.CLASSIFICATION, "mean_per_class_recall", 6_149, 102),
    Task("vtab/pets", "Oxford-IIIT Pet", Kind.CLASSIFICATION, "mean_per_class_recall", 3_669, 37),
    Task("voc2007", "Pascal VOC 2007", Kind.CLASSIFICATION, "acc1", 14_976, 20),
    Task("vtab/pcam", "PatchCamelyon", Kind.CLASSIFICATION, "acc1", 32_768, 2),
    Task("renderedsst2", "Rendered SST2", Kind.CLASSIFICATION, "acc1", 1_821, 2),
    Task("vtab/resisc45", "RESISC45", Kind.CLASSIFICATION, "acc1", 6_300, 45),
    Task("cars", "Stanford Cars", Kind.CLASSIFICATION, "acc1", 8_041, 196),
    Task("stl10", "STL-10", Kind.CLASSIFICATION, "acc1", 8_000, 10),
    Task("sun397", "SUN397", Kind.CLASSIFICATION, "acc1", 108_754, 397),
    Task("vtab/svhn", "SVHN", Kind.CLASSIFICATION, "acc1", 26_032, 10),
    Task("retrieval/flickr_1k_test_image_text_retrieval", "Flickr", Kind.RETRIEVAL, "mean_recall@1", 1_000, None),
    Task("retrieval/mscoco_2014_5k_test_image_text_retrieval", "MSCOCO", Kind.RETRIEVAL, "mean_recall@1", 5_000, None),
    Task("misc/winogavil", "WinoGAViL", Kind.WINOGAVIL, "jaccard_score_10-12", 3_563, None),
    Task("wilds/iwildcam", "iWildCam", Kind.WILDS, "F1-macro_all", 42_791, 182),
    Task("wilds/camelyon17", "Camelyon17", Kind.WILDS, "acc1", 85_054, 2),
    Task("wilds/fmow", "FMoW", Kind.WILDS, "acc_worst_region", 22_108, 62),
    Task("fairness/dollar_street", "Dollar Street", Kind.GROUPS, "acc_top5_wg", 3_503, 58),
    Task("fairness/geode", "GeoDE", Kind.GROUPS, "acc_wg", 12_488, 40),
    Task("fairness/fairface", "FairFace", Kind.FACES, None, 10_954, None),
    Task("fairness/utkface", "UTKFace", Kind.FACES, None, 23_703, None),
)
# fmt: on

TASKS: dict[str, Task] = {task.key: task for task in _TASKS}
