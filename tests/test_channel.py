"""Channels and stages: order, bounds, errors and stopping, without a thread left behind."""

from __future__ import annotations

import threading
import time

import pytest

from gpu_lance.ingest.channel import Channel, Stage, Stopped


def test_items_arrive_in_order_and_the_end_is_seen() -> None:
    channel: Channel[int] = Channel(2)

    def send() -> None:
        for i in range(50):
            channel.put(i)
        channel.close()

    sender = Stage("send", send)
    assert list(channel) == list(range(50))
    sender.result()


def test_a_full_channel_makes_the_sender_wait() -> None:
    channel: Channel[int] = Channel(2)
    sent: list[int] = []

    def send() -> None:
        for i in range(5):
            channel.put(i)
            sent.append(i)
        channel.close()

    sender = Stage("send", send)
    time.sleep(0.2)
    assert sent == [0, 1]
    assert list(channel) == [0, 1, 2, 3, 4]
    sender.result()


def test_the_senders_error_reaches_the_receiver_before_what_waits() -> None:
    channel: Channel[int] = Channel(4)
    channel.put(1)
    channel.close(KeyError("broken"))
    with pytest.raises(KeyError, match="broken"):
        list(channel)


def test_a_receiver_that_stops_ends_the_sender() -> None:
    channel: Channel[int] = Channel(1)

    def send() -> None:
        while True:
            channel.put(0)

    sender = Stage("send", send)
    time.sleep(0.05)
    channel.stop()
    sender.join(5)
    assert not sender.is_alive()
    assert isinstance(sender.error, Stopped)


def test_a_stage_raises_what_its_function_raised() -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Stage("fail", fail).result()


def test_stages_are_daemons_so_that_they_never_keep_a_process_alive() -> None:
    release = threading.Event()
    stage = Stage("wait", release.wait)
    assert stage.daemon
    release.set()
    assert stage.result() is True
