import logging
import os
import re
from types import SimpleNamespace

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_jax.data import bucket, files, tar
from clip_jax.data.damage import Unreachable
from clip_jax.data.pipeline import InputConfig
from clip_jax.data.shards import Shards
from clip_jax.errors import UserError
from tests.data.buckets import serving
from tests.data.make_shards import caption, photo, write_tar
from tests.data.test_shards import assert_same, batches_of, open_source

WINDOWS = {"block": 8, "window": 2, "lanes": 2}
SHARDS = (range(0, 16), range(16, 40))  # blocks of 8 lie within them
SCHEMES = ("gs", "s3")


@pytest.fixture(scope="module")
def servers():
    """By scheme, what stands in front of an emulator; fsspec and the processes that tests start find them."""
    from gcp_storage_emulator.server import create_server
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    gcs = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    gcs._api.daemon = True
    gcs.start()
    s3 = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    s3.start()
    with (
        serving(gcs._api._httpd.server_port) as before_gcs,
        serving(s3.get_host_and_port()[1]) as before_s3,
        pytest.MonkeyPatch.context() as patch,
    ):
        environment = {
            "STORAGE_EMULATOR_HOST": before_gcs.url,
            "FSSPEC_GS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks what emulators do not answer, by gRPC
            "AWS_ENDPOINT_URL": before_s3.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
        }
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setitem(fsspec.config.conf, "gs", {"token": "anon"})  # fsspec has read the environment by now
        fsspec.filesystem("s3").mkdir("bucket")
        yield {"gs": before_gcs, "s3": before_s3}
    s3.stop()
    gcs.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for number, indices in enumerate(SHARDS):
        write_tar(folder / f"{number:05}.tar", indices)
    return folder


@pytest.fixture(autouse=True)
def hurry(monkeypatch, tmp_path):
    """Short pauses, and a cache of the test's own."""
    monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bucket, "_PAUSES", (0.01, 0.1))
    monkeypatch.setattr(bucket, "_PATIENCE", 30.0)
    monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=_sleep_shortly))
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 2)


async def _sleep_shortly(seconds):
    pass


@pytest.fixture(params=SCHEMES)
def server(request, servers):
    """The server of one scheme, its URL of a new folder with the shards in `place`."""
    server = servers[request.param]
    server.clear()
    server.place = f"{request.param}://bucket/{abs(hash(request.node.name)):x}"
    return server


@pytest.fixture
def stored(server, folder):
    """The same, with the shards in its folder and indexes beside them."""
    upload(folder, server.place)
    len(open_source("tar", f"{server.place}/*.tar"))
    server.clear()
    return server


def upload(folder, place):
    for path in folder.glob("*.tar"):
        files.write(f"{place}/{path.name}", path.read_bytes())


def read_all(source):
    return [source.read(index) for index in range(len(source))]


def test_a_bucket_gives_the_batches_of_local_files(stored, folder):
    expected = batches_of(open_source("tar", f"{folder}/*.tar", **WINDOWS), count=3)
    assert_same(batches_of(open_source("tar", f"{stored.place}/{{00000..00001}}.tar", **WINDOWS), count=3), expected)


def test_worker_processes_read_buckets(servers, folder):
    places = [f"{scheme}://bucket/workers" for scheme in SCHEMES]
    for place in places:
        upload(folder, place)
    local, remote = (
        tuple(open_source("tar", f"{place}/*.tar", **WINDOWS) for place in two) for two in ([folder, folder], places)
    )
    assert_same(batches_of(*remote, count=2, config=InputConfig(data_processes=1)), batches_of(*local, count=2))


def test_a_block_is_one_request(stored):
    source = open_source("tar", f"{stored.place}/*.tar", **WINDOWS)
    stored.clear()
    assert [source[index].captions[0] for index in range(40)] == [caption(index) for index in range(40)]
    assert len(stored.gets(".tar")) == 5  # blocks of 8


def test_an_index_is_kept_in_the_bucket_and_made_again_for_a_changed_shard(server, folder):
    upload(folder, server.place)
    pattern = f"{server.place}/*.tar"
    assert len(open_source("tar", pattern)) == 40
    assert [os.path.basename(file.path) for file in files.find(f"{server.place}/.clip_jax_index/*")] == [
        "00000.tar.npz",
        "00001.tar.npz",
    ]
    server.clear()
    Shards(files.find(pattern), tar.scan)
    assert len(server.gets(".npz")) == 2 and not server.gets(".tar")
    other = fsspec.filesystem(server.place.partition(":")[0], skip_instance_cache=True)  # as another machine would
    other.pipe_file(f"{server.place}/00000.tar", (folder / "00001.tar").read_bytes())
    source = open_source("tar", pattern)
    assert len(source) == 48 and source[0].captions == (caption(16),)


def test_an_index_goes_to_the_cache_where_the_bucket_is_read_only(server, folder, tmp_path):
    upload(folder, server.place)
    server.spoil("^(POST|PUT)", "always 403")
    for _ in range(2):
        server.requests.clear()
        assert len(Shards(files.find(f"{server.place}/*.tar"), tar.scan)) == 40
    assert not server.gets(".tar")
    assert len(list((tmp_path / "cache" / "index").rglob("*.tar.npz"))) == 2


def test_gzip_shards_are_fetched_in_large_pieces(server, tmp_path):
    write_tar(tmp_path / "a.tar.gz", range(20), "w:gz")
    files.write(f"{server.place}/a.tar.gz", (tmp_path / "a.tar.gz").read_bytes())
    source = open_source("tar", f"{server.place}/a.tar.gz")
    assert source[4].captions == (caption(4),)
    assert len(server.gets("a.tar.gz")) == 1
    indexes = f"{server.place}/indexes"
    assert len(open_source("tar", f"{server.place}/a.tar.gz", index_dir=indexes)) == 20
    assert len(files.find(f"{indexes}/*/a.tar.gz.npz")) == 1


@pytest.mark.parametrize("on_damage", ["stop", "skip"])
def test_tables_are_read_from_buckets(server, tmp_path, on_damage, monkeypatch):
    columns = {"image": [photo(index) for index in range(20)], "caption": [caption(index) for index in range(20)]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=5)
    files.write(f"{server.place}/a.parquet", (tmp_path / "a.parquet").read_bytes())
    here, there = (open_source("parquet", f"{place}/*.parquet") for place in (tmp_path, server.place))
    assert_same(batches_of(there, count=2), batches_of(here, count=2))
    monkeypatch.setattr(bucket, "_PATIENCE", 0.0)
    there = open_source("parquet", f"{server.place}/a.parquet")
    server.spoil("GET.*parquet", "always 503")
    with pytest.raises(Unreachable, match=r"a[.]parquet cannot be reached"):
        batches_of(there, count=1, config=InputConfig(on_damage=on_damage))


def test_damaged_shards_are_told_as_on_a_disk(server, folder, tmp_path):
    shard = (folder / "00000.tar").read_bytes()
    for name, content in (("cut.tar", shard[:50_000]), ("header.tar", shard[:1536] + b"x" * 512), ("empty.tar", b"")):
        (tmp_path / name).write_bytes(content)
        files.write(f"{server.place}/{name}", content)
    here, there = (Shards(files.find(f"{place}/*.tar"), tar.scan) for place in (tmp_path, server.place))
    assert [str(item).partition("/")[2] for item in there.damage] != []
    assert [str(item).replace(server.place, str(tmp_path)) for item in there.damage] == [
        str(item) for item in here.damage
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{00000..00002}.tar", "{place}/00002.tar is missing"),
        ("*.zip", "no file matches {place}/*.zip"),
        ("nowhere/{0..1}.tar", "{place}/nowhere is missing"),
        ("a.tar::b", "{place}/a.tar::b: expected a plain URL"),
    ],
)
def test_missing_shards_are_named(stored, name, message):
    with pytest.raises(UserError, match=r"/nowhere is missing$"):
        files.one(f"{stored.place}/nowhere")
    with pytest.raises(UserError, match=re.escape(message.format(place=stored.place))):
        open_source("tar", f"{stored.place}/{name}")


FAULTS = {
    "503": ["503", "503"],
    "other statuses": ["500", "429"],
    "reset": ["reset", "reset", "reset"],
    "reset in body": ["reset in body"],
    "cut": ["cut", "cut"],
    "slow": ["wait 0.3"],
    "many": ["503"] * 8,  # beyond what the libraries retry
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_passing_errors_change_nothing(stored, folder, faults):
    expected = read_all(Shards(files.find(f"{folder}/*.tar"), tar.scan))
    stored.spoil("GET.*(prefix|npz)", *faults)  # listings and indexes
    shards = Shards(files.find(f"{stored.place}/*.tar"), tar.scan)
    stored.spoil("GET.*tar", *faults)
    assert shards.read_range(0, len(shards)) == expected
    assert not any(left for _, left in stored.faults)


@pytest.mark.parametrize(
    ("on_damage", "fault"), [("skip", "503"), ("skip", "reset"), ("skip", "403"), ("stop", "503"), ("stop", "cut")]
)
def test_a_bucket_that_is_down_stops_the_run(stored, fault, on_damage, monkeypatch):
    monkeypatch.setattr(bucket, "_PATIENCE", 0.0)
    source = open_source("tar", f"{stored.place}/*.tar", **WINDOWS)
    stored.spoil("GET.*[.]tar", f"always {fault}")
    state = "is refused" if fault == "403" else "cannot be reached"
    with pytest.raises(Unreachable, match=f"^{stored.place}/0000[01].tar {state} [(].*[)][^\n]*$"):
        batches_of(source, count=1, config=InputConfig(on_damage=on_damage))


def test_a_stalled_connection_is_given_up(servers, monkeypatch):
    monkeypatch.setattr(bucket, "_SILENCE", 0.2)
    bucket._options.cache_clear()
    server, url = servers["gs"], "gs://bucket/stall/a"
    files.write(url, bytes(100_000))
    server.spoil("GET.*stall", "stall")
    assert files.read(url, 10, 1000) == bytes(1000)
    assert not server.outlasted
    server.released.set()
    bucket._options.cache_clear()
