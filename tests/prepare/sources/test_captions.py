"""Captions of a user's own folder: read whole where the layout is known, else refused or noted; never guessed."""

import io
import json
import unicodedata
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.params import parse_params
from pipeline.errors import BadData, ConfigError
from pipeline.prepare.framing import Framing
from pipeline.prepare.reports import captions_in_words, notes_in_words
from pipeline.prepare.sources.folder import Folder

FRAMING = Framing(16, "crop", (255, 255, 255))
WORDS = ("café crème, red", "1girl, solo", 'a 5" wide "thing"')
NAMES = ("000.png", "001.png", "002.png")


@pytest.fixture()
def raw(tmp_path):
    """Listing opens no image."""
    (tmp_path / "raw").mkdir()
    for name in NAMES:
        (tmp_path / "raw" / name).write_bytes(b"image")
    return tmp_path / "raw"


def listing(raw, rule="auto"):
    return Folder(raw.parent, "raw", FRAMING, rule).listing()


def captions(raw, rule="auto"):
    return [item.captions for item in listing(raw, rule).items]


def put(raw, name, content) -> None:
    (raw / name).parent.mkdir(parents=True, exist_ok=True)
    (raw / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def csv_text(separator=",", header="file_name,text", names=NAMES, words=WORDS, quote=True, blank=""):
    def cell(text):
        return '"' + text.replace('"', '""') + '"' if quote else text

    rows = [f"{name}{separator}{blank}{cell(word)}" for name, word in zip(names, words, strict=True)]
    return "\r\n".join([header.replace(",", separator + blank), *rows]) + "\r\n"


def lines(column="text", file="file_name", names=NAMES, **more):
    rows = ({file: name, column: word, **more} for name, word in zip(names, WORDS, strict=True))
    return "".join(json.dumps(row) + "\n" for row in rows)


def rows(**more):
    return [{"file_name": name, "text": word, **more} for name, word in zip(NAMES, WORDS, strict=True)]


def parquet(columns):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


READ = {
    "JSON lines": ("metadata.jsonl", lines()),
    "JSON lines, prompt": ("metadata.jsonl", lines("prompt")),
    "JSON lines, description": ("metadata.jsonl", lines("description")),
    "JSON lines, Alt-Text": ("metadata.jsonl", lines("Alt-Text")),
    "JSON lines, image": ("metadata.jsonl", lines("caption", "image")),
    "JSON lines, path with a dot": ("metadata.jsonl", lines(file="path", names=[f"./{n}" for n in NAMES])),
    "JSON lines, a column that holds the names": ("metadata.jsonl", lines(file="which")),
    "JSON lines, backslashes": ("metadata.jsonl", lines(names=[f".\\{n}" for n in NAMES])),
    "JSON lines, absolute names": ("metadata.jsonl", lines(names=[f"/home/me/set/{n}" for n in NAMES])),
    "JSON lines, names of Windows": ("metadata.jsonl", lines(names=[f"C:\\set\\{n.upper()}" for n in NAMES])),
    "JSON lines, no suffixes": ("metadata.jsonl", lines(names=[n[:-4] for n in NAMES])),
    "JSON lines, other suffixes": ("metadata.jsonl", lines(names=[n[:-4] + ".jpg" for n in NAMES])),
    "JSON lines, capitals": ("Metadata.JSONL", lines()),
    "JSON lines, another name": ("metadata1000.jsonl", lines()),
    "JSON lines, a name that says nothing": ("train.jsonl", lines()),
    "JSON lines, UTF-16": ("metadata.jsonl", lines().encode("utf-16")),
    "a list": ("metadata.json", json.dumps(rows())),
    "a list, indented": ("captions.json", json.dumps(rows(width=3), indent=2)),
    "a list, in JSON lines' name": ("metadata.jsonl", json.dumps(rows(), indent=1)),
    "lines, in JSON's name": ("metadata.json", lines()),
    "kohya": ("meta_cap.json", json.dumps({n: {"caption": w} for n, w in zip(NAMES, WORDS, strict=True)})),
    "kohya, tags": ("meta_lat.json", json.dumps({n: {"tags": w} for n, w in zip(NAMES, WORDS, strict=True)})),
    "kohya, absolute stems": (
        "meta_cap.json",
        json.dumps({f"/set/{n[:-4]}": {"caption": w} for n, w in zip(NAMES, WORDS, strict=True)}),
    ),
    "an object": ("captions.json", json.dumps(dict(zip(NAMES, WORDS, strict=True)), indent=1)),
    "CSV": ("metadata.csv", csv_text()),
    "CSV, BOM": ("metadata.csv", csv_text().encode("utf-8-sig")),
    "CSV, UTF-16": ("metadata.csv", csv_text().encode("utf-16")),
    "CSV, UTF-16, big end first": ("metadata.csv", b"\xfe\xff" + csv_text().encode("utf-16-be")),
    "CSV, semicolons": ("metadata.csv", csv_text(";")),
    "CSV, semicolons, not quoted": ("metadata.csv", csv_text(";", quote=False, words=WORDS)),
    "CSV, bars": ("captions.csv", csv_text("|")),
    "CSV, tabs": ("metadata.csv", csv_text("\t")),
    "TSV": ("metadata.tsv", csv_text("\t", quote=False)),
    "TSV, in capitals": ("CAPTIONS.TSV", csv_text("\t")),
    "CSV, blanks after commas": ("metadata.csv", csv_text(blank=" ")),
    "CSV, capital header": ("metadata.csv", csv_text(header="File_Name,Text")),
    "CSV, header with blanks": ("metadata.csv", csv_text(header="File Name , Caption ")),
    "CSV, quoted header": ("metadata.csv", csv_text(header='"image","prompt"')),
    "CSV, more columns": ("labels.csv", csv_text(header="filename,sentence")),
    "CSV, commas at the end": ("metadata.csv", csv_text().replace("\r\n", ",\r\n").replace("text,", "text")),
    "a text file of Flickr": ("captions.txt", csv_text(header="image,caption")),
    "Parquet": ("metadata.parquet", parquet({"file_name": NAMES, "text": WORDS, "width": [1.5] * 3})),
    "Parquet, other columns": ("train.parquet", parquet({"Image": NAMES, "Caption": WORDS})),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_metadata_of_a_known_layout_are_read_whole(raw, case) -> None:
    put(raw, *READ[case])
    found = listing(raw)
    assert [item.captions for item in found.items] == [(word,) for word in WORDS]
    assert found.notes == ()
    name = READ[case][0]
    assert all(item.origin.startswith(f"{name} (column ") for item in found.items)


@pytest.mark.parametrize("case", READ)
def test_metadata_beside_a_folder_of_images_are_read(tmp_path, case) -> None:
    folder = tmp_path / "raw" / "images"
    folder.mkdir(parents=True)
    for name in NAMES:
        (folder / name).write_bytes(b"image")
    put(tmp_path / "raw", *READ[case])
    assert captions(tmp_path / "raw") == [(word,) for word in WORDS]


REFUSED = {
    "CSV, cp1252": ("metadata.csv", csv_text().encode("cp1252"), "004 .*csv line 2: is neither UTF-8"),
    "CSV, cp932": ("metadata.csv", csv_text(words=("猫", "犬", "鳥")).encode("cp932"), "line 2.*UTF-8"),
    "CSV, UTF-16 without its mark": ("captions.csv", csv_text().encode("utf-16-le"), "E-CAP-004 .* line 1.*UTF-8"),
    "JSON lines, cp1252": ("metadata.jsonl", '{"a": "000.png",\n"text": "café"}'.encode("cp1252"), "line 2"),
    "CSV, commas without quotes": (
        "metadata.csv", csv_text(quote=False), '008 .* line 2: has 3 fields, .*in quotes: a.png,"',
    ),
    "CSV, semicolons without quotes": (
        "metadata.csv", "file_name;text\n000.png;a;b\n", "E-CAP-008 .* line 2: has 3 fields, the header has 2",
    ),
    "CSV, one comma in the last line": (
        "metadata.csv", csv_text(words=("a", "b", "c")) + "000.png,a,b\n", "E-CAP-008 .* line 5: has 3 fields",
    ),
    "CSV, unknown columns": ("captions.csv", "file,en\n000.png,a\n", "E-CAP-009 .*captions.csv: .*, but file, en"),
    "JSON, unknown columns": ("metadata.jsonl", lines("english"), "E-CAP-009 .*, but file_name, english"),
    "Parquet, unknown columns": ("meta.parquet", parquet({"file": NAMES, "x": WORDS}), "E-CAP-009 .*file, x"),
    "CSV, no header": ("captions.csv", "000.png,a\n001.png,b\n", "E-CAP-0.. .*000.png, a"),
    "CSV, a column twice": ("metadata.csv", "file_name,text,Text\n000.png,a,b\n", "has the column text twice"),
    "CSV, an open quote": (
        "metadata.csv", 'file_name,text\n000.png,"a\n001.png,b"\n002.png,c\n', "a quote that is not closed",
    ),
    "CSV, an open quote in the last line": (
        "metadata.csv", 'file_name,text\n000.png,a\n001.png,"b\n', "is not CSV .*Fix: close each quote",
    ),
    "CSV, a quote inside": ("metadata.csv", 'file_name,text\n000.png,"a 5" nail"\n', "line 2: .* and double those"),
    "CSV, a long text": ("metadata.csv", "file_name,text\n000.png," + "x" * 10**6, "line 2: .* Fix: shorten it"),
    "no column of names": ("metadata.jsonl", '{"text": "a"}', "E-CAP-004 .* line 1: has no file_name, but text"),
    "rows that name no image": ("metadata.csv", "file_name,text\nx.png,a\ny.png,b\n", "007 .*'x.png', 'y.png'"),
    "kohya, of another folder": ("meta_cap.json", '{"x": {"caption": "a"}}', "E-CAP-007 .*'x'"),
    "names that fit two images": ("meta.csv", "file_name,text\na/000.png,x\nb/000.png,y\n", "E-CAP-007"),
    "no rows": ("metadata.jsonl", "\n", "E-CAP-007 .*holds no rows"),
    "only a header": ("metadata.csv", "file_name,text\n", "E-CAP-007 .*holds no rows"),
    "COCO without images": ("captions.json", '{"images": [], "annotations": [{"image_id": 3}]}',
        "E-CAP-004 .* annotation 1: is of image 3, which `images` lacks. Fix: give it `images`"),
    "COCO without captions": ("captions.json", '{"images": [{"id": 3, "file_name": "000.png"}], "annotations": '
        '[{"image_id": 3, "bbox": []}]}', "E-CAP-009 .*has no column of captions, but bbox, file_name"),
    "a number": ("metadata.json", "3", "E-CAP-004 .*is neither a list"),
    "broken JSON": ("metadata.json", "[{]", "E-CAP-004 .*is not JSON"),
    "a list of texts": ("metadata.json", '["a"]', "E-CAP-004 .* row 1: is not a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_metadata_that_cannot_be_read_whole_stop(raw, case) -> None:
    name, content, words = REFUSED[case]
    put(raw, name, content)
    with pytest.raises(BadData, match=words) as caught:
        listing(raw)
    assert caught.value.exit_status == 65 and len(str(caught.value).splitlines()) == 1


def test_captions_of_coco_are_read_from_beside_the_folders_of_images(tmp_path) -> None:
    raw = tmp_path / "raw"
    for name in ("val2017/1.png", "val2017/2.png"):
        put(raw, name, "image")
    images = [{"id": 7, "file_name": "1.png"}, {"id": 8, "file_name": "2.png"}]
    texts = [(8, "b"), (7, "a"), (8, "c")]
    annotations = [{"id": n, "image_id": image, "caption": text} for n, (image, text) in enumerate(texts)]
    tree = {"info": {}, "images": images, "annotations": annotations}
    put(raw, "annotations/captions_val2017.json", json.dumps(tree))
    put(raw, "annotations/captions_train2017.json", json.dumps(tree).replace(".png", "0.png"))
    found = listing(raw)
    assert [item.captions for item in found.items] == [("a",), ("b", "c")]
    (note,) = found.notes
    words = "E-CAP-006 raw/annotations/captions_train2017.json: is not read: names no image that is here"
    assert str(note).startswith(words)


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("file_name,text,source\n000.png,red, round,web\n", None),  # an error, as it has more fields
        ("file_name,text,source\n000.png,red, round\n001.png,blue,web\n002.png,a,b\n", [2]),
        ("file_name,text,\n000.png,red,round\n001.png,blue,\n", [2]),
        ("file_name, text, source\n000.png, red, web\n", []),
        ('file_name,text,source\n000.png,"red, round",web\n001.png,red,\n', []),
        ("text,file_name\nred,000.png\n", []),
    ],
)
def test_captions_that_seem_cut_at_a_comma_are_counted_with_an_example(raw, text, cut) -> None:
    put(raw, "metadata.csv", text)
    if cut is None:
        with pytest.raises(BadData, match="E-CAP-008"):
            listing(raw)
        return
    told = [str(note) for note in listing(raw).notes if note.code == "E-CAP-013"]
    assert len(told) == len(cut)
    for note, number in zip(told, cut, strict=True):
        assert f"has {len(cut)} lines whose caption may be cut, such as line {number}, '000.png,red," in note


def test_other_columns_that_look_like_captions_are_named(raw) -> None:
    put(raw, "metadata.jsonl", lines(blip_caption="x", caption_length=3, url="u"))
    (note,) = listing(raw).notes
    assert str(note).startswith("E-CAP-012 raw/metadata.jsonl: has columns that may be captions and are not")
    assert "are not read: blip_caption. Fix: text is read; name" in str(note)


@pytest.mark.parametrize("rule", ["sidecar", "folder", "filename", "none"])
def test_a_rule_that_needs_no_metadata_does_not_read_them(raw, rule) -> None:
    put(raw, "metadata.csv", "nonsense")
    put(raw, "000.txt", "a caption")
    assert listing(raw, rule).notes == ()


NOTED = {
    "data.csv": ("file_name,text\n000.png,a,b\n", "E-CAP-006 raw/data.csv: is not read: has 3 fields"),
    "data.jsonl": ("caf\xe9".encode("latin-1"), "E-CAP-006 raw/data.jsonl: is not read: is neither UTF-8"),
    "data.json": ("{]", "E-CAP-006 raw/data.json: is not read: is not JSON"),
    "000.cls": ("3", "E-CAP-006 raw: 1 .cls files are not read: 000.cls"),
    "001.xml": ("<x/>", "E-CAP-006 raw: 1 .xml files are not read: 001.xml"),
    "captions.yaml": ("x", "E-CAP-006 raw: 1 .yaml files are not read: captions.yaml"),
    "002.json": ('{"shapes": []}', "E-CAP-006 raw: 1 .json files without a caption are not read: 002.json"),
    "other.txt": ("a caption", "E-CAP-005 raw/other.txt: has no image of its name beside it"),
    "other.TXT": ("a caption", "E-CAP-005 raw/other.TXT: has no image of its name beside it"),
}


@pytest.mark.parametrize("name", NOTED)
def test_what_looks_like_captions_and_is_not_read_is_named(raw, name) -> None:
    content, words = NOTED[name]
    put(raw, name, content)
    (note,) = listing(raw).notes
    assert str(note).startswith(words)
    assert captions(raw) == [(), (), ()]


def test_many_notes_of_a_kind_are_one_line_with_their_count(raw) -> None:
    for number in range(12):
        put(raw, f"sample{number}.outputs.txt", "a caption")
    (line,) = notes_in_words(listing(raw).notes)
    assert line.startswith("note: 12 like this: E-CAP-005 raw/sample0.outputs.txt: has no image")


@pytest.mark.parametrize(
    "name", ["000.txt", "000.TXT", "000.caption", "000.Caption", "000.png.txt", "000.json", "000.JSON"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_files_beside_images_are_read_in_any_case_and_marked_encoding(raw, name, encoding) -> None:
    text = json.dumps({"caption": "señor niño", "url": "x"}) if "json" in name.lower() else "señor niño\r\n"
    put(raw, name, text.encode(encoding))
    found = listing(raw)
    assert found.items[0].captions == ("señor niño",) and found.notes == ()
    assert found.items[0].origin == f".{name.lower().rsplit('.', 1)[1]} files"


@pytest.mark.parametrize(
    "content", ["señor".encode("cp1252"), "猫".encode("cp932"), "abcd".encode("utf-16-le")]
)
def test_a_file_beside_an_image_in_another_encoding_flaws_it(raw, content) -> None:
    put(raw, "000.txt", content)
    flaw = listing(raw).items[0].flaw
    assert (
        flaw.code == "E-CAP-002" and "000.txt" in str(flaw) and "line 1" in str(flaw) and "UTF-8" in flaw.fix
    )


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('{"caption": "a"}', ("a",)),
        ('{"Caption": ["a", "b"]}', ("a", "b")),
        ('"a"', ("a",)),
        ('["a", "b"]', ("a", "b")),
        ('{"caption": null, "status": "success"}', ()),
        ('{"prompt": "a", "seed": 3}', ("a",)),
    ],
)
def test_json_beside_an_image_may_hold_its_captions(raw, content, texts) -> None:
    put(raw, "000.json", content)
    assert captions(raw)[0] == texts


def test_text_comes_before_json_and_a_name_as_written_before_one_in_another_case(raw) -> None:
    put(raw, "000.json", '{"caption": "json"}')
    put(raw, "000.txt", "text")
    put(raw, "a.png", "image")
    put(raw, "A.png", "image")
    put(raw, "a.txt", "small")
    put(raw, "A.txt", "large")
    found = {item.id: item.captions for item in listing(raw).items}
    assert found["000.png"] == ("text",) and found["a.png"] == ("small",) and found["A.png"] == ("large",)


@pytest.mark.parametrize(
    ("rule", "texts"),
    [
        ("auto", [("row",), ("beside",), ("red cat",)]),
        ("metadata", [("row",), (), ()]),
        ("sidecar", [("other",), ("beside",), ()]),
        ("folder", [("red cat",)] * 3),
        ("filename", [("img one",), ("img two",), ("img three",)]),
        ("none", [(), (), ()]),
    ],
)
def test_a_rule_chooses_where_captions_are_from(tmp_path, rule, texts) -> None:
    folder = tmp_path / "raw/10_red cat"
    for name in ("img_one.png", "img_two.png", "img-three.png"):
        put(folder, name, "image")
    put(folder, "metadata.jsonl", '{"file_name": "img_one.png", "text": "row"}')
    put(folder, "img_one.txt", "other")
    put(folder, "img_two.txt", "beside")
    found = {item.id.split("/")[1]: item.captions for item in listing(tmp_path / "raw", rule).items}
    assert [found[name] for name in ("img_one.png", "img_two.png", "img-three.png")] == texts


@pytest.mark.parametrize("rule", ["metadata", "sidecar"])
def test_a_rule_that_finds_nothing_stops(raw, rule) -> None:
    with pytest.raises(BadData, match=f"E-CAP-011 raw: no image has captions by data.captions: {rule}"):
        listing(raw, rule)


def test_a_rule_for_folders_has_no_meaning_elsewhere(tiny_tree) -> None:
    for source in ("openmoji==17.0.0", "parquet", "torchvision:CIFAR10"):
        with pytest.raises(ConfigError, match=f"captions: sidecar has no effect with source {source}"):
            parse_params(
                {**tiny_tree, "data": {**tiny_tree["data"], "source": source, "captions": "sidecar"}}
            )


def test_where_captions_are_from_is_told_with_counts_that_add_up(tmp_path) -> None:
    for name in ("a.png", "b.png", "cats/c.png", "cats/d.png", "e.png", "f.png"):
        put(tmp_path / "raw", name, "image")
    put(tmp_path / "raw", "metadata.jsonl", '{"file_name": "a.png", "prompt": "x"}\n')
    put(tmp_path / "raw", "b.TXT", "y")
    items = listing(tmp_path / "raw").items
    line, warning, foldered = captions_in_words(items, "auto")
    assert line == (
        "captions of 6 images: 2 from folder names, 1 from metadata.jsonl (column prompt), "
        "1 from .txt files, 2 without"
    )
    assert warning == "warning: 2 images have no caption: raw/e.png, raw/f.png"
    assert foldered == (
        "warning: 2 images have no caption but the name of the folder, unlike others (data.captions: sidecar or "
        "metadata leaves them without): raw/cats/c.png, raw/cats/d.png"
    )
    assert captions_in_words(items, "none") == [line]
    assert sum(Counter(item.origin for item in items).values()) == 6


@pytest.mark.parametrize("name", ["Été.txt", "été.caption", "metadata.csv"])
def test_accents_may_be_written_as_on_a_mac(tmp_path, name) -> None:
    """There, a file's name has a letter and its accent as two characters."""
    put(tmp_path / "raw", unicodedata.normalize("NFD", "été.png"), "image")
    put(
        tmp_path / "raw", name, "a meadow" if name != "metadata.csv" else "file_name,text\nété.png,a meadow\n"
    )
    found = listing(tmp_path / "raw")
    assert [item.captions for item in found.items] == [("a meadow",)] and found.notes == ()


def test_one_caption_for_nearly_all_is_told(tmp_path) -> None:
    for number in range(12):
        put(tmp_path / "raw", f"images/{number}.png", "image")
    _, warning = captions_in_words(listing(tmp_path / "raw").items, "auto")
    assert warning == "warning: 12 of 12 images have one caption, 'images'"


def test_two_tables_for_one_image_are_told(raw) -> None:
    put(raw, "metadata.jsonl", lines())
    put(raw, "captions.csv", csv_text(words=("x", "y", "z")))
    found = listing(raw)
    assert [item.captions for item in found.items] == [(word,) for word in WORDS]
    (note,) = found.notes
    assert str(note).startswith(
        "E-CAP-010 raw/captions.csv: describes 3 images that a table before it describes"
    )
