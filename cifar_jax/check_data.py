"""Check a data set before training on it: ``python -m cifar_jax.check_data``."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

from cifar_jax import cli
from cifar_jax.config import TrainConfig
from cifar_jax.errors import CifarJaxError, DataError, shown
from cifar_jax.options import Options, option_of

DESCRIPTION = """\
Check all images of a data set as training would read them: list every file that cannot be used, not
only the first, and every image of another size than the first; report duplicate images, whatever
their names; count the images of each class. Nothing is changed. The exit code is 3 if a file cannot
be used as it is.

DATA is anything that --data of cifar_jax.train takes.

examples:
  python -m cifar_jax.check_data photos/ --image-size 64
  python -m cifar_jax.check_data cifar10.tar.gz
"""


@dataclasses.dataclass(frozen=True)
class CheckOptions(Options):
    """How training would read the data."""

    image_size: int | None = option_of(TrainConfig, "image_size", group="data")
    data_dir: str | None = option_of(TrainConfig, "data_dir", group="data")


def check_data(data: str, options: CheckOptions) -> None:
    """Print all problems of ``data``, its duplicates, and the size of each class.

    Raises:
        DataError: a file cannot be used as it is, or there is no such data.
        UsageError: an ``image_size`` for data whose images are not files.
    """
    import hashlib
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    from tqdm import tqdm

    from cifar_jax.data.dataset import ImageFiles
    from cifar_jax.data.images import decode_file
    from cifar_jax.data.sources import check_source, load_splits, warn_of_absent_classes

    def look(place: tuple[str, int]) -> bytes | tuple[CifarJaxError, bool]:
        """A digest of the image; or the error, and whether only its size is wrong."""
        images = splits[place[0]].images
        if not isinstance(images, ImageFiles):
            return hashlib.sha256(images[place[1]].tobytes()).digest()
        path = images.paths[place[1]]
        try:
            return hashlib.sha256(decode_file(images, path).tobytes()).digest()
        except CifarJaxError as error:
            try:
                decode_file(dataclasses.replace(images, resize=True), path)
            except CifarJaxError:
                return error, False
            return error, True

    def described(name: str, i: int) -> str:
        images = splits[name].images
        return f"{name} {shown(images.paths[i]) if isinstance(images, ImageFiles) else f'#{i}'}"

    check_source(data, options.image_size)
    found = load_splits(data, data_dir=options.data_dir, image_size=options.image_size)
    if found.notice:
        print(f"note: {' '.join(found.notice.split())}")
    splits = {"train": found.train, "val": found.val, "test": found.test}
    places = [(name, i) for name, split in splits.items() for i in range(len(split))]
    n_bad, of_another_size, same = 0, [], defaultdict(list)
    with ThreadPoolExecutor() as pool:
        looks = tqdm(pool.map(look, places), "looking", len(places), unit="images", disable=None)
        for place, found_there in zip(places, looks, strict=True):
            if isinstance(found_there, bytes):
                same[found_there].append(place)
                continue
            error, is_sound = found_there
            print(f"{'another size' if is_sound else 'bad'}: {error.what}")
            if is_sound:
                of_another_size.append(error)
            else:
                n_bad += 1
    # Duplicates within a class count too: another --seed may put one of them into validation.
    twice = [x for x in same.values() if len(x) > 1]
    for x in twice:
        print(f"the same image: {', '.join(described(*place) for place in x)}")
    counts = [np.bincount(x.labels, minlength=len(found.class_names)) for x in splits.values()]
    print(f"{'class':20s}{'train':>10s}{'val':>10s}{'test':>10s}")
    class_names = map(shown, found.class_names)
    for class_name, row in zip(class_names, zip(*counts, strict=True), strict=True):
        print(f"{class_name:20s}" + "".join(f"{count:10,d}" for count in row))
    warn_of_absent_classes(found)
    print(
        f"{n_bad:,} bad file(s), {len(of_another_size):,} image(s) of another size, "
        f"{len(twice):,} image(s) that are there twice"
    )
    wrong, fixes = [], []
    if n_bad:
        wrong.append(f"{n_bad:,} file(s) of {data} cannot be used")
        fixes.append("mend or remove the bad files named above")
    if of_another_size:
        wrong.append(f"{len(of_another_size):,} image(s) of {data} are of another size than others")
        fixes.append(of_another_size[0].fix)
    if wrong:
        raise DataError(", and ".join(wrong), fix="; ".join(fixes))


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.make_parser(
        CheckOptions, prog="python -m cifar_jax.check_data", description=DESCRIPTION
    )
    parser.add_argument("data", metavar="DATA", help="a folder, an archive or a name")
    given = parser.parse_given(argv)
    check_data(given.pop("data"), CheckOptions(**given))


if __name__ == "__main__":
    cli.run(main, beside_training=True)
