"""Whether a string is text: JSON escapes and undecodable arguments make strings that are not."""


def is_unicode(text: str) -> bool:
    """False for a string with a lone surrogate, which no file, tokenizer or terminal takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
