"""What a study's files say about single training images: how they were learned, what the teacher
thinks of them, which images are like them."""

from functools import cached_property

import numpy as np
import pandas as pd
import torch

from kdlib.cache.outputs import stored_logits
from kdlib.cache.shards import Cache
from kdlib.cartography.course import Courses, courses, regions_of
from kdlib.cartography.datamap import REGIONS
from kdlib.cartography.log import DynamicsLog
from kdlib.cartography.representatives import representatives, sample
from kdlib.dataset.images import Images
from kdlib.probes.neighbours import nearest
from kdlib.steps.datamap import demand_recorded
from kdlib.steps.recordings import open_log
from kdlib.steps.teacher_outputs import open_stored
from kdlib.study.study import Study


class Examples:
    """The training images of a study, asked about one by one; a file is opened when it is needed.

    A method whose file is not there raises FileNotFoundError or ValueError, with the reason.
    """

    def __init__(self, study: Study, images: Images) -> None:
        self.study, self.images = study, images

    @cached_property
    def log(self) -> DynamicsLog:
        """The recorded training from which the datamap is made."""
        demand_recorded(self.study)
        return DynamicsLog.open(self.study.recorded_run / "dynamics", self.images.fingerprints)

    def courses(self, example_ids: np.ndarray) -> Courses:
        """How some images were learned, epoch by epoch."""
        return courses(self.log, example_ids)

    @cached_property
    def _stored(self) -> Cache:
        return open_stored(self.study, self.images.train)

    def teacher_probs(self, example_ids: np.ndarray) -> np.ndarray:
        """The teacher's probability of each class for some images, (n, C) float32."""
        logits = stored_logits(self._stored, np.asarray(example_ids))
        return torch.softmax(logits, 1).numpy()

    def features(self, example_ids: np.ndarray) -> np.ndarray:
        """The teacher's stored features of some images, (n, D) float32."""
        return self._stored.read("features", np.asarray(example_ids))[:, 0].astype(np.float32)

    @cached_property
    def _all_features(self) -> np.ndarray:
        return self.features(self.images.train_ids)

    def neighbours(self, example_id: int, n: int) -> pd.DataFrame:
        """The training images whose teacher features have the highest cosine with one image's:
        `example_id`, `similarity`, the most similar first."""
        ids = self.images.train_ids
        table = nearest(self._all_features, int(np.searchsorted(ids, example_id)), n)
        return table.assign(example_id=ids[table.pop("position")])[["example_id", "similarity"]]

    def representatives(self, example_ids: np.ndarray, n: int = 12) -> tuple[pd.DataFrame, int]:
        """Images that stand for a selection, as of `kdlib.cartography.representatives`, and of how
        many images of it the groups were made."""
        read = sample(np.asarray(example_ids))
        labels = self.images.train.read("labels", read)
        return representatives(read, self.features(read), labels, n), len(read)

    @cached_property
    def regions_by_recording(self) -> pd.DataFrame:
        """The region of each image, by the rule `variability`, in each finished recording that the
        study asks for: index `example_id`, a column `<model> <part>` for each."""
        regions = {}
        wanted = self.study.recordings.runs() if self.study.recordings else []
        for model, part in wanted:
            if not part.startswith("seed="):
                continue  # not of all images with their own labels
            try:
                log = open_log(self.study, self.images, model, part)
            except FileNotFoundError:
                continue  # not made yet
            regions[f"{model} {part}"] = pd.Categorical(regions_of(log), REGIONS)
        return pd.DataFrame(regions, pd.Index(self.images.train_ids, name="example_id"))
