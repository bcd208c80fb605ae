"""A TFDS dataset of a few documents; TFDS wants builders in a package."""

from tests.little_stories.little_stories import LittleStories

__all__ = ["LittleStories"]
