import numpy as np
import pytest
import torch
from PIL import Image

from data import InMemory, adm_crop, load_dataset
from utils.cli import UserError
from utils.files import write_whole
from utils.images import is_plain, open_picture, picture_files, read_picture
from utils.processes import global_batch, keyed_generator, user_errors


def test_every_epoch_is_a_permutation():
    n, batch = 10, 4
    # 40 = 4 epochs
    row = np.concatenate([global_batch(n, batch, step, seed=3) for step in range(10)])
    epochs = row.reshape(4, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    # alone, and across a boundary
    assert np.array_equal(row[28:32], global_batch(n, batch, 7, seed=3))
    assert not np.array_equal(row[:4], global_batch(n, batch, 0, seed=4))
    # fewer pictures than a batch
    assert sorted(global_batch(3, 6, 0, seed=0)) == [0, 0, 1, 1, 2, 2]


def test_keyed_generators():
    def draw(*key):
        return torch.rand(3, generator=keyed_generator(*key)).tolist()
    keys = [("eps", 0, 1, 2), ("eps", 0, 2, 1), ("eps", 0, 12), ("sample", 0, 1, 2),
            ("eps", 0, 1, 2, 0)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)
    assert draw(*keys[0]) == draw(*keys[0])


def test_folder(photos):
    found = load_dataset(str(photos), 32)
    assert found.classes == ["left", "right", "top"] and found.name == "photos"
    assert torch.bincount(found.labels).tolist() == [12, 12, 12]
    pictures = found.load([0, 13, 25])
    assert pictures.shape == (3, 3, 32, 32) and pictures.dtype == torch.uint8
    with Image.open(photos / "left" / "0.png") as picture:          # 40 x 34: the middle 34 columns
        expected = np.asarray(picture.crop((3, 0, 37, 34)).resize((32, 32),
                                                                  Image.Resampling.BICUBIC))
    assert np.array_equal(pictures[0].permute(1, 2, 0).numpy(), expected)
    (photos / "left" / "notes.txt").write_text("not a picture")
    (photos / "left" / ".hidden.png").write_text("nor this")
    assert load_dataset(str(photos), 32).recipe == found.recipe
    Image.new("RGB", (50, 50)).save(photos / "left" / "more.png")
    assert load_dataset(str(photos), 32).recipe != found.recipe


def test_folder_reads_every_kind_of_picture(tmp_path):
    folder = tmp_path / "set" / "only"
    folder.mkdir(parents=True)
    grey = Image.fromarray(np.full((20, 20), 100, np.uint8))
    grey.save(folder / "a.png")
    grey.convert("CMYK").save(folder / "b.jpg", quality=95)
    grey.convert("P").save(folder / "c.gif")
    grey.convert("RGBA").save(folder / "d.png")
    grey.convert("LA").save(folder / "e.png")
    exif = Image.Exif()
    exif[0x0112] = 6                                                    # to be turned by 90 degrees
    half = np.zeros((20, 20, 3), np.uint8)
    half[:10] = 200
    Image.fromarray(half).save(folder / "f.png", exif=exif)
    found = load_dataset(str(tmp_path / "set"), 16).load(range(6)).float()
    assert ((found[:5] - 100).abs() < 6).all()
    assert (found[5, :, :, 10:] > 190).all() and (found[5, :, :, :6] < 10).all()


def test_folder_refuses(tmp_path):
    def refused(message, *args):
        with pytest.raises(UserError, match=message):
            load_dataset(*args).load([0])

    refused("--dataset: no data set is called 'nosuch'", "nosuch", 32)
    refused("does not exist", str(tmp_path / "missing"), 32)
    refused("has no class folders", str(tmp_path), 32)
    (tmp_path / "rose").mkdir()
    refused("rose has no pictures", str(tmp_path), 32)
    (tmp_path / "rose" / "1.jpg").write_bytes(b"this is no JPEG")
    refused("1.jpg cannot be read as a picture .*or use --skip-bad", str(tmp_path), 32)
    Image.new("RGB", (64, 64)).save(tmp_path / "rose" / "1.jpg")
    whole = (tmp_path / "rose" / "1.jpg").read_bytes()
    (tmp_path / "rose" / "1.jpg").write_bytes(whole[:len(whole) * 2 // 3])
    refused("1.jpg cannot be read as a picture", str(tmp_path), 32)
    Image.new("RGB", (64, 8)).save(tmp_path / "rose" / "1.jpg")
    refused("1.jpg has a side of 8 pixels, smaller than", str(tmp_path), 32, 16)
    refused("is a file", str(tmp_path / "rose" / "1.jpg"), 32)
    refused("--split test: only flowers has splits", "imagenet", 32, 1, "datasets", "test")
    (tmp_path / "rose" / "1.jpg").unlink()
    (tmp_path / "rose" / "1.jpg").symlink_to("nowhere.jpg")
    refused("1.jpg is a link that leads nowhere; or use --skip-bad", str(tmp_path), 32)


def test_what_is_transparent_becomes_white(tmp_path):
    clear = Image.fromarray(np.array([[[200, 0, 0, 255], [0, 0, 0, 0], [0, 0, 0, 128]]], np.uint8))
    clear.save(tmp_path / "a.png")
    assert np.asarray(read_picture(tmp_path / "a.png")).tolist() == [[[200, 0, 0], [255] * 3,
                                                                      [127] * 3]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([200, 0, 0, 0, 0, 0])
    palette.save(tmp_path / "b.png", transparency=1)
    assert np.asarray(read_picture(tmp_path / "b.png")).tolist() == [[[200, 0, 0], [255] * 3]]
    Image.fromarray(np.array([[100, 1_000_000]], np.int32)).save(tmp_path / "c.tif")
    with pytest.raises(UserError, match="c.tif .*its values are not of 8 bits"):
        read_picture(tmp_path / "c.tif")


def test_two_ways_to_read_a_picture(tmp_path):
    """As training reads it, upright, on white; and whether PIL's convert would do the same."""
    exif = Image.Exif()
    exif[0x0112] = 6                                                    # to be turned by 90 degrees
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[0] = (200, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert read_picture(tmp_path / "a.png").size == (2, 3)
    with open_picture(tmp_path / "a.png") as picture:
        assert not is_plain(picture)
    Image.new("RGB", (3, 2)).save(tmp_path / "b.png")
    with open_picture(tmp_path / "b.png") as picture:
        assert is_plain(picture)
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="b.png cannot be read as a picture"):
        read_picture(tmp_path / "b.png")


def test_picture_files(tmp_path):
    """The same walk for training and scoring: hidden files are left out, a loop of links ends."""
    (tmp_path / "deep" / ".hidden").mkdir(parents=True)
    for name in ("b.PNG", "a.jpg", "deep/c.webp", "deep/.hidden/d.png", ".e.png", "notes.txt", "f"):
        (tmp_path / name).touch()
    (tmp_path / "deep" / "up").symlink_to(tmp_path)
    found, others = picture_files(tmp_path)
    assert found == [str(tmp_path / name) for name in ("a.jpg", "b.PNG", "deep/c.webp")]
    assert others == {".txt": 1, "without ending": 1, "links to what is there already": 1}


# Pixels (S // 2, S // 3) and the last one, and the mean, of what ADM's own center_crop_arr makes
# of the pictures below.
@pytest.mark.parametrize("W,H,S,pixel,last,mean", [
    (500, 375, 64, [100, 146, 63], [37, 125, 202], 127.933837890625),      # halved twice
    (130, 257, 64, [180, 173, 41], [198, 200, 129], 126.75341796875),      # once, odd sides
    (300, 1201, 100, [201, 124, 177], [241, 126, 80], 127.77356666666667),
    (61, 50, 64, [228, 49, 228], [17, 243, 213], 118.87320963541667),      # enlarged
    (64, 64, 64, [243, 61, 213], [118, 104, 193], 121.95222981770833),     # left as it is
])
def test_imagenet_is_cropped_as_adm_does(W, H, S, pixel, last, mean):
    y, x = np.mgrid[:H, :W]
    picture = np.stack([(x * 7 + y * 3) % 256, (x * y) // 11 % 256, (x - 2 * y) % 256],
                       axis=-1).astype(np.uint8)
    cropped = np.asarray(adm_crop(Image.fromarray(picture), S))
    assert cropped[S // 2, S // 3].tolist() == pixel and cropped[-1, -1].tolist() == last
    assert cropped.mean() == pytest.approx(mean, abs=1e-3) and cropped.shape == (S, S, 3)


def test_skip_bad_leaves_out_and_counts(photos, tmp_path, capsys):
    root, every = tmp_path / "datasets", load_dataset(str(photos), 32)
    (photos / "left" / "3.png").write_bytes(b"no picture")
    Image.new("RGB", (4, 4)).save(photos / "top" / "5.png")
    found = load_dataset(str(photos), 32, 16, root, skip_bad=True)
    said = capsys.readouterr().err
    assert "2 of 36 pictures of photos are left out" in said and "left/3.png" in said
    assert torch.bincount(found.labels).tolist() == [11, 12, 11]
    assert len(found.load(range(34))) == 34
    assert found.recipe != every.recipe
    # the same size: the list is not made again
    (photos / "left" / "3.png").write_bytes(b"NO PICTURE")
    assert load_dataset(str(photos), 32, 16, root, skip_bad=True).recipe == found.recipe
    for file in (photos / "left").iterdir():
        file.write_bytes(b"nor this")
    with pytest.raises(UserError, match="class left .* has no pictures"):
        load_dataset(str(photos), 32, 16, root, skip_bad=True)


def test_write_whole_keeps_what_was_there(tmp_path):
    path = tmp_path / "deep" / "file"
    with write_whole(path) as part:
        part.write_text("first")
    with pytest.raises(RuntimeError):
        with write_whole(path) as part:
            part.write_text("half of the sec")
            raise RuntimeError("a bug")
    with pytest.raises(UserError, match="cannot write .*No space left"):
        with write_whole(path) as part:
            raise OSError(28, "No space left on device")
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("message,status", [("this is wrong, do that", 1), ("--flag: do that", 2)])
def test_user_errors_are_one_line(message, status, capsys):
    @user_errors
    def main(argv=None):
        raise UserError(message)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == status
    assert capsys.readouterr().err.endswith(f"error: {message}\n")


def test_ctrl_c_is_one_line(capsys):
    @user_errors
    def main(argv=None):
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stop:
        main()
    error = capsys.readouterr().err
    assert stop.value.code == 130 and "interrupted" in error and error.count("\n") == 1


def test_pictures_in_memory():
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = InMemory(images, [0, 1, 1, 0, 2, 2], ["a", "b", "c"])
    assert torch.equal(found.load([4, 1]), images[[4, 1]]) and found.labels.tolist() == [0, 1, 1, 0, 2, 2]
    assert InMemory(images, [0, 1, 1, 0, 2, 2], ["a", "b", "c"]).recipe == found.recipe
    labels = found.labels
    for wrong in ((images / 255, labels, "abc"), (images[:, :1], labels, "abc"), (images[..., :4], labels, "abc"),
                  (images, labels[:5], "abc"), (images, labels, "ab"), (images, labels, "abcd"), (images, labels - 1, "abc")):
        with pytest.raises(ValueError, match="images uint8|labels must be 0"):
            InMemory(*wrong)
    for other in (InMemory(images.flip(0), found.labels, "abc"), InMemory(images, [1, 0, 0, 1, 2, 2], "abc"),
                  InMemory(images, found.labels, "abd")):
        assert other.recipe != found.recipe
