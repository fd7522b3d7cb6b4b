"""Option models of the sources of public datasets; importing them loads no reader."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from trec_twotower.data.sources.event_logs.log_options import LogOptions, Moment
from trec_twotower.data.sources.options import FolderOptions


class GowallaOptions(FolderOptions):
    """Folder of the raw files, and the share of train held out for validation."""

    valid_share: float = Field(0.2, ge=0, lt=1, description="share of each user's train items; 0 writes no valid split")
    valid_power: float = Field(0.0, ge=0, le=2, description="sampling weight: item interaction count to this power")
    seed: int = Field(7, ge=0, description="seed of the items held out for valid/")


class BeautyOptions(FolderOptions):
    """Folder of the raw files, and limits on the history of a train row."""

    max_history: PositiveInt = Field(50, description="newest items kept in a train row")
    min_history: int = Field(1, ge=0, description="train rows with fewer earlier items are left out")
    seed: int = Field(0, ge=0, description="has no effect: this source samples nothing")


class RatingOptions(FolderOptions, LogOptions):
    """Threshold of positive ratings. Repeats of a user and an item are dropped by default."""

    min_rating: float = Field(4.0, description="lower ratings are neither positives nor in a history")
    dedupe: bool = True
    split: Literal["leave-last-out", "time", "none"] = "leave-last-out"


class ReviewOptions(RatingOptions):
    """Files to read, reviews to keep, and the split.

    The default dates are those of the benchmark published with the data.
    """

    category: str | None = Field(None, description="such as Books; default: all categories with files in the folder")
    verified_only: bool = Field(False, description="keep only reviews of verified purchases")
    metadata: bool = Field(True, description="false: items/ has only ids")
    all_items: bool = Field(False, description="also keep metadata items without a kept review (cold items)")
    description_chars: int = Field(1000, ge=0, description="maximum length of features plus description, in characters")
    min_user_events: int = Field(5, ge=1)
    min_item_events: int = Field(5, ge=1)
    split: Literal["leave-last-out", "time", "none"] = "time"
    valid_from: Moment | None = Field(
        1628643414, description="split = time: the start of valid/ (2021-08-11), in seconds or as a date"
    )
    test_from: Moment | None = Field(
        1658002729, description="split = time: the start of test/ (2022-07-16), in seconds or as a date"
    )


class GoodbooksOptions(RatingOptions):
    """Threshold of positive ratings, and the optional files to read."""

    split: Literal["leave-last-out", "none"] = "leave-last-out"
    max_tags: int = Field(10, ge=0, description="number of most frequent shelves per book; 0 leaves them out")
    to_read: bool = Field(False, description="add the list `to_read` to users/")

    @property
    def has_times(self) -> bool:
        return False


class MovielensOptions(RatingOptions):
    """Threshold of positive ratings, and the split."""

    max_tags: int = Field(10, ge=0, description="number of most frequent tags per item; 0 leaves them out")
