"""Processes that share a folder: one alone or several together, claims, processes that were killed."""

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest

from dcbench import members
from dcbench.members import InUse, Member, present

OTHER = """
import sys
from pathlib import Path
from dcbench.members import Member
member = Member(Path(sys.argv[1]), "waiting")
member.enter(sys.argv[2])
print(member.name, member.claim("a"), flush=True)
sys.stdin.read()
member.leave()
"""


class Other:
    """Another process in the folder, which has claimed "a"."""

    def __init__(self, folder, mode):
        self.process = subprocess.Popen(
            [sys.executable, "-c", OTHER, str(folder), mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.name, claimed = self.process.stdout.readline().split()
        assert claimed == "True"

    def end(self):
        self.process.communicate("")

    def kill(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def other(tmp_path):
    started = []

    def start(mode):
        started.append(Other(tmp_path, mode))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def entered(folder, mode, **how):
    member = Member(folder)
    member.enter(mode, **how)
    return member


@pytest.mark.parametrize(
    ("first", "second", "allowed"),
    [("alone", "alone", False), ("alone", "shared", False), ("shared", "alone", False), ("shared", "shared", True)],
)
def test_who_may_be_there_with_whom(first, second, allowed, tmp_path, other):
    one = other(first)
    if allowed:
        entered(tmp_path, second).leave()
    else:
        with pytest.raises(InUse, match=f"process {one.process.pid} on .*, which is waiting"):
            entered(tmp_path, second)
    one.end()
    entered(tmp_path, second).leave()
    assert [path.name for path in tmp_path.iterdir()] == ["claims"]


def test_a_killed_process_is_noticed_at_once(tmp_path, other):
    one = other("shared")
    member = entered(tmp_path, "shared")
    assert not member.claim("a")
    one.kill()
    time.sleep(1.1)  # for so long a living process is not looked at again
    assert member.claim("a")
    assert member.claim("a")
    member.leave()
    other("alone").kill()
    member = entered(tmp_path, "alone")
    member.clear()
    assert [path.name for path in tmp_path.iterdir() if path.name != "claims"] == [f"{member.name}.alone-1"]
    assert not list((tmp_path / "claims").iterdir())
    member.leave()


def test_a_process_of_another_machine_counts_while_its_heart_beats(tmp_path, other, monkeypatch):
    one = other("shared")
    file = next(tmp_path.glob(f"{one.name}.*"))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"place": "another machine"}))
    one.kill()
    with pytest.raises(InUse):
        entered(tmp_path, "alone")
    assert [seen.name for seen in present(tmp_path)] == [one.name]
    long_ago = time.time() - members.SILENT - 5
    os.utime(file, (long_ago, long_ago))
    assert present(tmp_path) == []
    member = entered(tmp_path, "alone")
    assert member.claim("a")
    member.leave()


def test_a_process_with_the_number_of_an_ended_one_is_another_process(tmp_path):
    member = entered(tmp_path, "shared")
    about = {"pid": os.getpid(), "place": members._place(), "started": "1", "host": "here"}
    (tmp_path / "earlier.alone-1").write_text(json.dumps(about))
    assert member.claim("a")
    assert [seen.name for seen in present(tmp_path)] == [member.name]
    member.leave()
    entered(tmp_path, "alone").leave()


def test_its_file_is_touched_while_it_works(tmp_path, monkeypatch):
    monkeypatch.setattr(members, "BEAT", 0.02)
    member = entered(tmp_path, "shared")
    file = next(tmp_path.glob(f"{member.name}.*"))
    os.utime(file, (1, 1))
    until = time.monotonic() + 20
    while file.stat().st_mtime < 1000 and time.monotonic() < until:
        time.sleep(0.02)
    assert file.stat().st_mtime > 1000
    member.leave()


def test_waiting_until_the_others_have_left(tmp_path, other):
    one = other("shared")
    timer = threading.Timer(0.5, one.end)
    timer.start()
    start = time.monotonic()
    member = entered(tmp_path, "alone", wait=True)
    assert time.monotonic() - start > 0.4
    assert present(tmp_path)[0].name == member.name
    member.leave()


def test_of_many_claims_each_is_given_once(tmp_path):
    """Sixteen members, each in a thread, claim the same hundred names: each name has one of them."""
    given = []

    def work():
        member = entered(tmp_path, "shared")
        got = [name for name in map(str, range(100)) if member.claim(name)]
        done.wait()
        given.extend(got)
        member.leave()

    done = threading.Barrier(16)
    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(given) == Counter(map(str, range(100)))


def test_of_many_that_want_to_be_alone_at_most_one_is(tmp_path):
    inside, most = [], []

    def work():
        member = Member(tmp_path)
        try:
            member.enter("alone", wait=True)
        except InUse:
            return
        inside.append(member.name)
        most.append(len(inside))
        time.sleep(0.002)
        inside.remove(member.name)
        member.leave()

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 12
