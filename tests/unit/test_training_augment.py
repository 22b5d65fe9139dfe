"""Random crops, flips and distortions."""

import numpy as np
import pytest
from PIL import Image

from stages.training.augment import RAND_AUGMENT, augmented, random_box


def picture(width: int = 40, height: int = 30) -> Image.Image:
    """Every column of another grey, so that a flip and a shift show."""
    row = np.linspace(0, 255, width).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(row[None, :, None], (height, width, 3)).copy())


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


@pytest.mark.parametrize("size", [(40, 30), (1, 1), (300, 2), (5, 500)])
def test_boxes_lie_within_the_image_and_keep_their_share(size: tuple[int, int]) -> None:
    random = generator(0)
    for _ in range(200):
        left, top, right, bottom = random_box(size, 0.2, random)
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        if size == (40, 30):
            area = (right - left) * (bottom - top) / (size[0] * size[1])
            assert 0.15 < area <= 1
            assert 0.6 < (right - left) / (bottom - top) < 1.6


def test_the_same_generator_gives_the_same_picture() -> None:
    def made(seed: int) -> bytes:
        image = augmented(picture(), 16, 0.2, generator(seed))
        assert image.size == (16, 16) and image.mode == "RGB"
        return image.tobytes()

    assert made(3) == made(3)
    assert len({made(seed) for seed in range(20)}) == 20


def test_half_of_the_pictures_are_flipped() -> None:
    flipped = 0
    for seed in range(200):
        image = np.asarray(augmented(picture(), 16, 0.5, generator(seed))).astype(int)
        flipped += image[:, 0].mean() > image[:, -1].mean()
    assert 70 < flipped < 130


def test_operations_do_what_they_are_called() -> None:
    identity, autocontrast, brightness, sharpness, equalize, *moves = RAND_AUGMENT
    image = picture()
    dull = image.point(lambda value: 100 + value // 4)
    assert identity(image, 1).tobytes() == image.tobytes()
    assert np.asarray(autocontrast(dull, 1)).max() >= 254
    assert np.asarray(equalize(dull, 1)).std() > np.asarray(dull).std()
    # At magnitude 5 the original's factor is 1.0.
    assert brightness(image, 1).tobytes() == sharpness(image, 1).tobytes() == image.tobytes()
    assert len(moves) == 5
    for move in moves:
        there, back = np.asarray(move(image, 1.0)), np.asarray(move(image, -1.0))
        assert (there == 128).all(axis=2).any(), "what comes into view is grey"
        assert not np.array_equal(there, back)


def test_each_of_two_operations_is_applied_half_of_the_time() -> None:
    applied = []
    operations = tuple(
        lambda image, sign, index=index: applied.append((index, sign)) or image
        for index in range(len(RAND_AUGMENT))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.training.augment.RAND_AUGMENT", operations)
        for seed in range(400):
            augmented(picture(), 16, 0.2, generator(seed))
    assert 330 < len(applied) < 470, "of 800 draws"
    assert {index for index, _ in applied} == set(range(10))
    assert 130 < sum(sign > 0 for _, sign in applied) < 270
