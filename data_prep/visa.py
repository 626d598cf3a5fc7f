"""VisA: photographs of 12 kinds of objects; tables say which of them train and test.

    ROOT/<category>/Data/Images/{Normal,Anomaly}/<stem>.JPG       upper case
                   /Data/Masks/Anomaly/<stem>.png                 values are kinds of defects
                   /image_anno.csv                                not read
    ROOT/split_csv/{1cls,2cls_highshot,2cls_fewshot}.csv          object,split,label,image,mask

or as the dataset's own script for preparing it arranges it, where masks are 0 and 255 and the folders are the table:

    ROOT/[{1cls,2cls_highshot,2cls_fewshot}/]<category>/{train,test}/{good,bad}/<stem>.JPG
                                                       /ground_truth/[{train,test}/]bad/<stem>.png

The paths in a table begin with the category. ROOT may also be an archive, a folder with such archives, or, without a
table, one category's folder. A category that is absent altogether is no fault, so that a part of the dataset can be
used; a listed image of a present category must be there. An image that the table does not list gets the split
"unlisted", which the counts of the manifest then show.
"""

import csv
import io
import re
from dataclasses import dataclass, replace

from data_prep.item import Item, Published, find_items, read_image
from data_prep.tree import RawTree
from dino_depth.errors import ConfigError, DataError

__all__ = ["LICENCE", "PUBLISHED", "VisaOptions", "items", "read_image"]

LICENCE = "VisA, CC BY 4.0"
LAYOUT = "[<category>/]Data/Images/{Normal,Anomaly}/*.JPG, or [<category>/]{train,test}/{good,bad}/*.JPG"
# The table says the split; the folder in its place is the same for all.
PATTERN = r"(?:.*/)?(?P<category>[^/]+)/(?P<split>Data)/Images/(?P<label>[^/]+)/(?P<stem>[^/]+)\.(?i:jpe?g)"
MASKS = r"(?:.*/)?(?P<mask>[^/]+/Data/Masks/[^/]+/[^/]+\.(?i:png))"
TABLES = ("1cls", "2cls_highshot", "2cls_fewshot")
PREPARED = (
    r"(?P<before>(?:.*/)?)(?P<category>[^/]+)/(?P<split>train|test)/(?P<label>good|bad)/(?P<stem>[^/]+)\.(?i:jpe?g)"
)
LABELS = {"Normal": "good", "Anomaly": "anomalous"}
PREPARED_LABELS = {"good": "good", "bad": "anomalous"}
LISTED_LABELS = {"normal": "good", "anomaly": "anomalous"}
COLUMNS = ("object", "split", "label", "image", "mask")
COUNTS = {
    "candle": (900, 100), "capsules": (542, 60), "cashew": (450, 50), "chewinggum": (453, 50), "fryum": (450, 50),
    "macaroni1": (900, 100), "macaroni2": (900, 100), "pcb1": (904, 100), "pcb2": (901, 100), "pcb3": (905, 101),
    "pcb4": (904, 101), "pipe_fryum": (450, 50),
}  # fmt: skip
PLACES = (("train", "good"), ("test", "good"), ("test", "anomalous"))
# Of the table 1cls.
PUBLISHED: list[Published] = [
    (category, *place, number)
    for category, numbers in COUNTS.items()
    for place, number in zip(PLACES, (*numbers, 100), strict=True)
]


@dataclass
class VisaOptions:
    """Which images of VisA train and which test.

    Attributes:
        split_csv: name of the table in the folder split_csv: 1cls (one class: training without anomalies),
            2cls_highshot or 2cls_fewshot; none: every image is in the split "all".
    """

    split_csv: str = "1cls"


@dataclass(frozen=True)
class Row:
    """What a table says of an image."""

    split: str
    label: str
    mask: str


def items(tree: RawTree, options: VisaOptions) -> list[Item]:
    """Every photograph of a dataset, or of one category where ``split_csv`` is none.

    Raises:
        ConfigError: ``split_csv`` is no name of a table.
        DataError: there is no photograph; the table is absent, unreadable or contradicts the folders, or an image that
            it lists is missing.
    """
    if not re.fullmatch(r"\w+", options.split_csv, re.ASCII):
        raise ConfigError(f"visa.split_csv must be the name of a table without its ending, got {options.split_csv!r}")

    def make(name: str, source: str, place: dict[str, str]) -> Item:
        if place["label"] not in LABELS:
            raise DataError(f"{tree.root / name.rpartition('/')[0]} is no label of visa: expected {', '.join(LABELS)}")
        category, stem = place["category"], place["stem"]
        # Of a sound image it names nothing that exists.
        extra = {"mask": f"{category}/Data/Masks/{place['label']}/{stem}.png"}
        return Item("visa", category, "all", LABELS[place["label"]], stem, tree[name], source, extra=extra)

    if not tree.find(PATTERN) and (prepared := tree.find(PREPARED)):
        return _prepared(tree, prepared, options)
    found = find_items(tree, "visa", PATTERN, LAYOUT, ("Data",), make)
    if options.split_csv != "none":
        found = _by_table(tree, options.split_csv, found)
    # Not by tree.find, which would open archives where there are no masks.
    matches = (re.fullmatch(MASKS, f"{tree.name}/{name}") for name in tree.names)
    masks = {match["mask"] for match in matches if match}
    return [item if item.extra["mask"] in masks else replace(item, extra={}) for item in found]


def _prepared(tree: RawTree, found: list[tuple[re.Match[str], str]], options: VisaOptions) -> list[Item]:
    """The items of a tree that its own script arranged, of one table where there are several."""
    tables = {table for match, _ in found for table in TABLES if f"/{table}/" in f"/{match['before']}"}
    table = options.split_csv
    if tables and table not in tables:
        raise DataError(f"{tree.root} is arranged by {', '.join(sorted(tables))}: visa.split_csv {table} is another")
    items = []
    for match, name in found:
        if tables and f"/{table}/" not in f"/{match['before']}":
            continue
        category, split, label, stem = (match[key] for key in ("category", "split", "label", "stem"))
        folder = name[: -len(f"{split}/{label}/{name.rpartition('/')[2]}")]
        masks = [f"ground_truth/{place}{label}/{stem}.png" for place in ("", f"{split}/")]
        mask = next((mask for mask in masks if folder + mask in tree), "")
        extra = {"mask": f"{category}/{mask}"} if mask else {}
        source = match[0][match.start("category") :]
        split = "all" if table == "none" else split
        items.append(Item("visa", category, split, PREPARED_LABELS[label], stem, tree[name], source, extra=extra))
    return items


def _by_table(tree: RawTree, table: str, found: list[Item]) -> list[Item]:
    """The items with the splits and masks that a table gives them."""
    rows, name = _rows(tree, table), f"split_csv/{table}.csv"
    present, sources = {item.category for item in found}, {item.source for item in found}
    if sources.isdisjoint(rows):
        raise DataError(f"{tree.root}: {name} lists none of the images: {next(iter(rows))}, but not {min(sources)}")
    missing = sorted(image for image in rows if image not in sources and image.partition("/")[0] in present)
    if missing:
        more = f" (as are {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(f"{tree.root}: {name} lists {missing[0]}, which is missing{more}")
    listed = []
    for item in found:
        row = rows.get(item.source, Row("unlisted", item.label, ""))
        if row.label != item.label:
            raise DataError(f"{tree.root}: {name} calls {item.source} {row.label}, its folder says {item.label}")
        listed.append(replace(item, split=row.split, extra={"mask": row.mask or item.extra["mask"]}))
    return listed


def _rows(tree: RawTree, table: str) -> dict[str, Row]:
    """What a table says, by the image's name from the category on."""
    found = tree.find(rf"(?:.*/)?split_csv/{table}\.csv")
    if len(found) != 1:
        raise DataError(
            f"{tree.root} holds {len(found)} tables split_csv/{table}.csv: give the folder of the whole dataset, or "
            "visa.split_csv none"
        )
    name, rows = found[0][1], {}
    try:
        text = tree[name].read().decode("utf-8-sig")
        for line, row in enumerate(csv.DictReader(io.StringIO(text, newline=""), strict=True), 2):
            if any(row.get(column) is None for column in COLUMNS):
                raise DataError(f"row {line} lacks one of {', '.join(COLUMNS)}")
            if row["split"] not in ("train", "test") or row["label"] not in LISTED_LABELS:
                raise DataError(f"row {line}: split {row['split']!r} or label {row['label']!r} is unknown")
            if row["image"] in rows:
                raise DataError(f"row {line} lists {row['image']} again")
            rows[row["image"]] = Row(row["split"], LISTED_LABELS[row["label"]], row["mask"])
    except (DataError, UnicodeError, csv.Error) as error:
        raise DataError(f"{tree[name]} is no table of splits: {error}") from error
    if not rows:
        raise DataError(f"{tree[name]} is no table of splits: it has no rows")
    return rows
