"""The documents of the file that the environment variable LITTLE_STORIES names, one a line."""

import json
import os
from pathlib import Path

import tensorflow_datasets as tfds


class LittleStories(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"story": tfds.features.Text()})
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(Path(os.environ["LITTLE_STORIES"]))}

    def _generate_examples(self, path):
        for number, line in enumerate(path.read_text().splitlines()):
            yield number, {"story": json.loads(line)}
