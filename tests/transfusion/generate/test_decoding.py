"""The text of tokens that come one by one is that of all of them, however it is cut."""
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from transfusion.generate.decoding import CUT, WINDOW, Decoding

TEXT = "Ein Käfer, two words , \U0001f600\U0001f468\u200d\U0001f469 and 中文字符。  Spaces   stay.\n" * 12


def bytes_alone() -> PreTrainedTokenizerFast:
    """Each byte is a token, so that most characters of TEXT are several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def spaced_words(clean_up: bool) -> PreTrainedTokenizerFast:
    """Words that carry the space before them, which is dropped at a text's beginning (Llama 2, SentencePiece)."""
    words = dict.fromkeys("\u2581" + word for word in TEXT.split())
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*words, "?"])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=clean_up)


@pytest.mark.parametrize("tokenizer", [bytes_alone(), spaced_words(False), spaced_words(True)],
                         ids=["bytes", "words", "words and commas drawn together"])
def test_it_is_at_each_token_what_the_tokenizer_says_of_all_and_costs_the_same_at_each(tokenizer, monkeypatch):
    tokens, whole, lengths = tokenizer(TEXT * 8)["input_ids"][:3 * WINDOW], tokenizer.decode, []
    assert len(tokens) > 2 * WINDOW
    decoding = Decoding(tokenizer)
    monkeypatch.setattr(tokenizer, "decode", lambda ids: lengths.append(len(ids)) or whole(ids))
    for count, token in enumerate(tokens, 1):
        decoding.tokens.append(token)
        assert decoding.text() == whole(tokens[:count])
    assert max(lengths) <= WINDOW + 4


def words_or_bytes() -> PreTrainedTokenizerFast:
    """The words "a" and "cat", and bytes for all else (Llama 2): a run of them is decoded as one, or not at all."""
    words = ["\u2581", "\u2581a", "\u2581cat", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def spelled(tokenizer, text):
    """Tokens of a text of the words "a" and "cat" and characters as their bytes."""
    names = ["\u2581" + word if word in ("a", "cat") else word for word in text.split(" ")]
    return [token for name in names for token in tokenizer.convert_tokens_to_ids(
        [name] if name[0] == "\u2581" else [f"<0x{byte:02X}>" for byte in name.encode()])]


@pytest.mark.parametrize("text", ["a caf\u00e9 cat", "\u4e2d\u6587 a", "\u4e2d\u6587\u5b57\u7b26" * 100,
                                  "cat " * WINDOW + "\u4e2d\u6587\u00e9\u4e2d\U0001f600 a"],
                         ids=["accent", "first", "bytes alone", "behind the window"])
def test_no_finished_character_goes_when_the_next_one_is_cut_and_none_costs_more(text, monkeypatch):
    tokenizer, lengths = words_or_bytes(), []
    tokens, whole = spelled(tokenizer, text), tokenizer.decode
    finished, decoding = [(0, "")], Decoding(tokenizer)
    for count in range(1, len(tokens) + 1):
        if CUT not in whole(tokens[:count]):
            finished.append((count, whole(tokens[:count])))
    monkeypatch.setattr(tokenizer, "decode", lambda ids: lengths.append(len(ids)) or whole(ids))
    for count, token in enumerate(tokens, 1):
        decoding.tokens.append(token)
        last, said = max(one for one in finished if one[0] <= count)
        assert decoding.text() == decoding.text() == said + CUT * (count - last)
    assert max(lengths) <= WINDOW + 4


def test_what_follows_a_cut_character_is_read():
    tokenizer = words_or_bytes()
    tokens = spelled(tokenizer, "a \u4e2d\u6587")[:-1] + spelled(tokenizer, "cat a \u6587")
    decoding = Decoding(tokenizer)
    for token in tokens:
        decoding.tokens.append(token)
        said = decoding.text()
    assert said == f"a\u4e2d{CUT}{CUT} cat a\u6587"


def test_no_tokens_are_no_text():
    assert Decoding(bytes_alone()).text() == ""


@pytest.mark.parametrize("text", ["cat a", "cat caf\u00e9 a", "cat " * 2 * WINDOW], ids=["words", "bytes", "long"])
def test_what_goes_on_with_a_text_keeps_the_space_between(text):
    tokenizer = words_or_bytes()
    before, tokens = spelled(tokenizer, "a"), spelled(tokenizer, text.strip())
    decoding = Decoding(tokenizer, before)
    assert decoding.text() == ""
    for count, token in enumerate(tokens, 1):
        decoding.tokens.append(token)
        said = decoding.text()
        if CUT not in said:
            assert tokenizer.decode(before + tokens[:count]) == "a" + said
    assert said.startswith(" cat")
