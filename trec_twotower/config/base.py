"""Base classes of all settings, validation, and error messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, TypeAdapter, ValidationError, model_validator
from pydantic_core import PydanticCustomError, core_schema

from trec_twotower.errors import ConfigError, nearest

Side = Literal["user", "item"]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
Shape = TypeVar("Shape")
# New names of renamed settings, by the pattern of their old path.
RENAMED_KEYS = {
    "data.own_item": "target_in_history",
    "model.*_tower.drop": "feature_dropout",
    "model.*_tower.missing": "missing_vectors",
    "model.*_tower.short": "short_term",
    "model.*_tower.unit": "unit_length",
    "model.*_tower.experts.top": "top_k",
    "loss.given": "impressions",
    "loss.regularise": "regularization",
    "loss.negatives.same": "same_category",
    "loss.negatives.queue": "cross_batch_memory",
    "loss.negatives.hardest": "top_k",
    "loss.negatives.refresh.ranks": "neighbor_range",
    "train.start": "spectral",
    "train.spectral.at": "when",
    "train.spectral.spread": "score_std",
}
_TAG = "|"  # first character of a union member's tag, which messages leave out of a setting's path


class Settings(BaseModel):
    """Base of every group of settings: frozen; unknown keys, NaN and infinity are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class KindSettings(Settings):
    """Base of a family of kinds, such as the losses: one subclass per kind, each with its own settings.

    A setting of another kind is refused by name. null means the default, since an override cannot remove a key.
    """

    kind: str
    variant: ClassVar[str] = ""  # setting that selects this class among those of its kind

    @classmethod
    def title(cls) -> str:
        """Return the kind, and the variant if there are several."""
        return str(cls.model_fields["kind"].default) + (f"{_TAG}{cls.variant}" if cls.variant else "")

    @classmethod
    def members(cls) -> list[type[KindSettings]]:
        """Return the classes of all kinds of this family."""
        below = cls.__subclasses__()
        return list(dict.fromkeys(member for each in below for member in each.members())) if below else [cls]

    @classmethod
    def is_chosen_by(cls, values: Mapping[str, Any]) -> bool:
        """Return whether settings of this kind belong to this variant of it."""
        return values.get(cls.variant) is not None

    @model_validator(mode="before")
    @classmethod
    def _refuse_settings_of_other_kinds(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        family = next(each for each in reversed(cls.__mro__) if issubclass(each, KindSettings) and each != KindSettings)
        known = {name for member in family.members() for name in member.model_fields}
        others = [name for name in values if name in known and name not in cls.model_fields]
        if wrong := [name for name in others if values[name] is not None]:
            variant = f" with {cls.variant}" if cls.variant else ""
            raise refusal(
                f"is of kind {cls.title().split(_TAG)[0]!r}{variant}, which has no {', '.join(wrong)}: remove it"
            )
        return {name: value for name, value in values.items() if value is not None or name not in known}


@dataclass(frozen=True)
class ByKind:
    """Annotation of a family's base class: settings become the subclass of their `kind`."""

    default: str | None = None  # kind if the settings have none

    def __get_pydantic_core_schema__(self, family: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        members: list[type[KindSettings]] = family.members()

        def tag_of(value: Any) -> str | None:
            if not isinstance(value, Mapping):
                return _TAG + value.title() if isinstance(value, KindSettings) else None
            kind = value.get("kind") or self.default
            variants = (each.title() for each in members if each.variant and each.is_chosen_by(value))
            chosen = next((title for title in variants if title.startswith(f"{kind}{_TAG}")), kind)
            return None if chosen is None else f"{_TAG}{chosen}"

        return core_schema.tagged_union_schema(
            {_TAG + member.title(): handler.generate_schema(member) for member in members}, tag_of
        )


def as_values(settings: BaseModel) -> dict[str, Any]:
    """Return the settings as plain values for YAML and JSON."""
    return settings.model_dump(mode="json")


def refusal(message: str) -> PydanticCustomError:
    """Return an error for validators; its message follows the name and value of the setting, or a group's name."""
    return PydanticCustomError("refused", "{message}", {"message": message})


def validate(shape: type[Shape], values: Any, origin: str) -> Shape:
    """Return `values` as settings of type `shape`; raises ConfigError with one line per mistake."""
    try:
        return TypeAdapter(shape).validate_python(values)
    except ValidationError as error:
        lines = dict.fromkeys(_message(shape, values, detail) for detail in error.errors())
        raise ConfigError(f"{origin}: " + "\n  ".join(lines)) from None


def _message(shape: Any, values: Any, detail: Any) -> str:
    """Return the sentence for one of pydantic's errors."""
    location, value, message = detail["loc"], detail["input"], detail["msg"].replace("Tuple", "List")
    parts = _named(values, location)
    place = ".".join(parts)
    match detail["type"]:
        case "value_error" | "assertion_error":
            return str(detail["ctx"]["error"])
        case "extra_forbidden" if new := [RENAMED_KEYS[each] for each in RENAMED_KEYS if fnmatchcase(place, each)]:
            return f"{place!r} has a new name: {'.'.join([*parts[:-1], *new])}."
        case "extra_forbidden":
            return f"unknown key {place!r}{nearest(str(location[-1]), _known_keys(shape, location[:-1]))}."
        case "missing":
            return f"{place!r} is missing: it has no default."
        case "union_tag_not_found" if isinstance(value, Mapping):
            return f"{'.'.join([*parts, 'kind'])!r} is missing: it has no default."
        case "union_tag_not_found" | "model_type":
            message = "input should be a group of settings"
        case "union_tag_invalid":
            titles = detail["ctx"]["expected_tags"].replace("'", "").split(", ")
            hint = nearest(str(value["kind"]), dict.fromkeys(title.split(_TAG)[1] for title in titles))
            return f"{'.'.join([*parts, 'kind'])!r} is {value['kind']!r}, which is not a kind{hint}."
        case "tuple_type":
            message = "input should be a list"
        case "refused" if isinstance(value, Mapping):
            return f"{place!r} {message}." if place else f"{message}."
    return f"{place!r} is {value!r}: {message[0].lower()}{message[1:]}."


def _named(values: Any, location: Iterable[str | int]) -> list[str]:
    """Return the parts of a location as overrides write them: list elements by their `name`, without tags."""
    names = []
    for part in location:
        if isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
            name = values.get("name") if isinstance(values, dict) else None
            names.append(name if isinstance(name, str) and name else str(part))
        elif isinstance(values, dict) and not str(part).startswith(_TAG):
            values = values.get(part)
            names.append(str(part))
    return names


def _known_keys(shape: Any, location: Iterable[str | int]) -> list[str]:
    """Return the keys that the settings at `location` in `shape` may have."""
    for part in location:
        group = _group_in(shape)
        if str(part).startswith(_TAG):
            members = group.members() if issubclass(group, KindSettings) else []
            shape = next((member for member in members if _TAG + member.title() == part), group)
        elif part in group.model_fields and get_origin(shape) not in (dict, tuple):
            shape = group.model_fields[str(part)].annotation
    return list(_group_in(shape).model_fields)


def _group_in(annotation: Any) -> type[BaseModel]:
    """Return the first group of settings in an annotation, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((group for part in get_args(annotation) if (group := _group_in(part)) is not Settings), Settings)
