"""Captions as clean text, and what makes one doubtful, in several scripts."""

import emoji
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.text import captions


def test_names_become_plain_english() -> None:
    assert captions.plain_english(":grinning_face:") == "grinning face"
    assert captions.plain_english(":thumbs_up_medium_skin_tone:") == "thumbs up medium skin tone"
    assert captions.plain_english("thumbs up: medium skin tone") == "thumbs up medium skin tone"
    assert captions.plain_english(":Japanese_\u201cacceptable\u201d_button:") == "japanese acceptable button"
    assert captions.plain_english(":two_o\u2019clock:") == "two o'clock"


def test_normalising_composes_and_drops_what_cannot_be_seen() -> None:
    assert captions.normalise("  a\tcafe\u0301 \n\x1b[31m\u202e\u200b x\x00 ") == "a caf\u00e9 [31m x"
    assert captions.normalise("\ufeff\n") == ""
    assert captions.normalise("cafe\u200b\u0301") == "caf\u00e9"


PIECES = st.sampled_from(
    [*"a e\u0301\u0344\u200d\u200b\ufe0f\u1100\u1161\u09c7\u09be\ud800\u2028\n", "👩", "🏽", "❤", "한"]
)


@example("A\u200d\u0300")  # a joiner in the way of a composition
@given(st.one_of(st.text(), st.lists(PIECES, max_size=40).map("".join)))
def test_a_normalised_caption_is_one_clean_line_and_stays_so(text) -> None:
    clean = captions.normalise(text)
    assert captions.normalise(clean) == clean == clean.strip()
    assert len(clean.splitlines()) <= 1
    clean.encode("utf-8")


def test_every_emoji_survives_but_flags_made_of_tags() -> None:
    """All that are recommended for interchange, families and skin tones included."""
    known = [
        text
        for text, entry in emoji.EMOJI_DATA.items()
        if entry["status"] <= emoji.STATUS["minimally_qualified"]
    ]
    tagged = {text for text in known if "\U000e007f" in text}
    assert len(known) > 3000 and {text[0] for text in tagged} == {"🏴"}
    changed = [text for text in known if captions.normalise(f"a {text} b") != f"a {text} b"]
    assert set(changed) == tagged


def test_joiners_stay_between_emoji_only() -> None:
    family = "👨\u200d👩\u200d👧"
    assert captions.normalise(f"\u200d{family}\u200d, a\u200db\u200d😀\u200d\u200d😀") == f"{family}, ab😀😀"


@pytest.mark.parametrize("mark", ["\u0301", "\u0344", "\u20dd", "\ufe0f"])
def test_heaps_of_combining_marks_are_cut(mark) -> None:
    clean = captions.normalise("zalgo" + mark * 10_000 + " text")
    assert len(clean) <= len("zalgo text") + captions.MAX_MARKS and clean.endswith(" text")


@pytest.mark.parametrize(
    "text",
    ["Tiếng Việt có dấu", "בְּרֵאשִׁ֖ית בָּרָ֣א", "हिन्दी में ऋग्वेद के शब्द", "བསྒྲུབས་", "เด็กกำลังยิ้ม", "اَلْعَرَبِيَّةُ", "한국어"],
)
def test_writing_with_many_marks_is_kept(text) -> None:
    import unicodedata

    assert captions.normalise(text) == unicodedata.normalize("NFC", text)


# --- What makes a caption doubtful.

GOOD = [
    "grinning face",
    "A man and his dog, 1920s; oil on canvas (detail)",
    "it's 5 o'clock & time for tea - I <3 it, if a < b > c",
    "café naïve, Ångström, ÇA VA, CORAÇÃO, NÃO",
    "noooo, hmm... what?!",
    "1000000 red balloons",
    "7",
    "A4",
    "no no, never",
    "красный кот на окне",
    "Ёжик в тумане",
    "قطة حمراء على النافذة",
    "مُدَرِّسَةٌ جَدِيدَةٌ",
    "חתול אדום על החלון",
    "窗台上的红猫",
    "哈哈哈，笑脸",
    "ハハハ と笑う猫",
    "窓辺の赤い猫、とても可愛い。",
    "창가의 빨간 고양이",
    "खिड़की पर लाल बिल्ली",
    "แมวสีแดงที่หน้าต่าง",
    "κόκκινη γάτα",
    "👍🏽",
    "👨\u200d👩\u200d👧\u200d👦 family",
    "😀😃😄",
    "❤️\u200d🔥",
    "sketch of the AKIA shop, sk-8er boy, ghp_ and eyJ",
]

DOUBTFUL = {
    "replacement character": ["caf\ufffd", "\ufffd", "красный к\ufffdт", "红\ufffd猫"],
    "wrongly decoded": ["cafÃ© noir", "itâ€™s a face", "ðŸ˜€ face"],
    "markup": [
        "<b>red</b> cat",
        "<script>alert(1)</script> cat",
        "cat<br/>dog",
        "<!-- cat -->",
        "cats &amp; dogs",
        "кот &nbsp; пёс",
        "猫&#39;s",
        "{{7*7}} cats",
        "${jndi:ldap} cats",
        "[31mred[0m cat",
    ],
    "a web address": [
        "see https://x.y/z",
        "WWW.example.de cat",
        "shutterstock.com cat",
        "кот с http://a",
        "猫 example.cn",
    ],
    "an e-mail address": ["write to jo.doe+a@mail.org now", "почта ivan@почта.рф"],
    "a file name": ["DSC0123.JPG cat", "red cat.png", "кот.jpeg"],
    "looks like a secret": [
        "AKIA" + "ABCDEFGHIJKLMNOP",
        "key ghp_" + "a1" * 18,
        "github_pat_" + "a1" * 11,
        "hf_" + "aB" * 15,
        "sk-" + "a1" * 10,
        "xoxb-" + "1234567890",
        "AIza" + "a" * 5 + "b1" * 15,
        "eyJ" + "hbGciOiJI" * 2 + ".eyJ" + "zdWIi",
        "-----BEGIN RSA PRIVATE " + "KEY-----",
    ],
    "one character repeated": [
        "aaaaaaah",
        "what!!!!!!",
        "ааааа кот",
        "哈哈哈哈哈",
        "ههههههه",
        "_____ cat",
        "😂😂😂😂😂",
    ],
    "mostly not letters": [
        "1234567",
        "IMG_20240101_123456",
        "!?#% a",
        "~~ ## ~~",
        "--- кот ---- /// ===",
        "12:30 / 猫",
    ],
    "repeated words": [
        "cat cat cat",
        "a red cat, a red cat, a red cat",
        "Кот кот КОТ",
        "قطة قطة قطة",
        "红猫红猫红猫",
        "かわいいかわいいかわいい",
        "buy now best buy now best buy now best",
    ],
}


@pytest.mark.parametrize("text", GOOD)
def test_ordinary_captions_have_no_flaws(text) -> None:
    assert captions.text_flaws(text) == []
    assert captions.normalise(text) == text


@pytest.mark.parametrize("flaw, text", [(flaw, text) for flaw, texts in DOUBTFUL.items() for text in texts])
def test_doubtful_captions_are_told(flaw, text) -> None:
    assert flaw in captions.text_flaws(text)


def test_flaws_come_once_and_in_one_order() -> None:
    text = "<b>cat cat cat</b> http://a.com \ufffd aaaaaa"
    wanted = ["replacement character", "markup", "a web address", "one character repeated", "repeated words"]
    assert captions.text_flaws(text) == wanted and captions.text_flaws("") == []


@given(st.text(max_size=200))
def test_any_text_may_be_asked_about(text) -> None:
    assert set(captions.text_flaws(text)) <= set(DOUBTFUL)
