"""Two hosts in network namespaces, with an sshd on each."""

import pytest

from tests.support.two_hosts import PROGRAMS, make_pair, require


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    require(PROGRAMS)
    pair = make_pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.close()


@pytest.fixture(scope="module")
def hostfile(tmp_path_factory):
    """Both hosts, one process on each."""
    file = tmp_path_factory.mktemp("hostfile") / "hosts"
    file.write_text("10.99.0.1 slots=1\nh2 slots=1\n")
    return file
