"""What the tests of the command line expect of an error."""


def refused(result, code, *words):
    """The exit code, and one line on standard error that has all ``words``."""
    assert result[0] == code and result[1] == ''
    assert result[2].startswith('gluon-optim: ') and result[2].count('\n') == 1
    assert all(word in result[2] for word in words), result[2]
