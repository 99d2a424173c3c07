"""The text of tokens that come one by one is that of all of them, however it is cut."""
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from transfusion.generate.decoding import WINDOW, Decoding

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


def test_no_tokens_are_no_text():
    assert Decoding(bytes_alone()).text() == ""
