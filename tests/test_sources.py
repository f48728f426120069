"""The manifest: what stands in it, and what may not."""

from pathlib import Path

import pytest

from data_processing.sources import EVALUATION_SETS, MANIFEST, Source, read_manifest, select

SHA = "sha256:" + "0123456789abcdef" * 4


def write(path: Path, *rows: str) -> Path:
    path.write_text("id\turl\tlayout\trole\tchecksum\tevaluation_set\n" + "".join(f"{row}\n" for row in rows))
    return path


def test_the_manifest_of_the_project_reads():
    sources = read_manifest()
    assert MANIFEST.read_text().count("\n") == len(sources) + 1
    assert all(source.verified == "no" for source in sources)
    assert {source.evaluation_set for source in sources} == {"", *EVALUATION_SETS}
    dlpfc = [source for source in sources if source.evaluation_set == "dlpfc"]
    assert len(dlpfc) == 12
    assert len({source.url for source in dlpfc}) == 12
    assert all(source.labels == 'obs["sce.layer_guess"]' for source in dlpfc)
    assert all(source.notes for source in sources if not source.url)  # where to look
    # Sections of an evaluation donor or block are not trained on.
    patients = {source.patient for source in select(sources, role="evaluation")} - {""}
    assert not patients & {source.patient for source in select(sources, role="corpus")}


def test_rows_arrive_as_they_stand(tmp_path):
    path = write(
        tmp_path / "sources.tsv",
        f'one\thttps://example.org/a "b"/x.h5ad?v=1#A1/outs\th5ad\tcorpus\t{SHA}\t'.replace(' "b"', ""),
        "",
        "two\t$DATA/my folder\tspace_ranger\tevaluation\t\tbreast",
        f"three\thttps://example.org/m.h5 | https://example.org/s.tgz\tgeo\tcorpus\t|{SHA}\t",
        "four\t\t\tevaluation\t\t",
    )
    one, two, three, four = read_manifest(path)
    assert (one.addresses, one.checksums, one.member) == (("https://example.org/a/x.h5ad?v=1",), (SHA,), "A1/outs")
    assert (two.addresses, two.is_local, two.evaluation_set, two.member) == (("$DATA/my folder",), True, "breast", "")
    assert three.addresses == ("https://example.org/m.h5", "https://example.org/s.tgz")
    assert (three.checksums, three.is_local) == (("", SHA), False)
    assert (four.addresses, four.checksums, four.verified, four.contents) == ((), (), "no", "slide")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("../up\tx\th5ad\tcorpus\t\t", r"line 3: id is '../up': give a file name"),
        ("a\tx\th5ad\tcorpus\t\t", r"line 3: id 'a' is that of line 2"),
        ("A\tx\th5ad\tcorpus\t\t", r"line 3: id 'A' is that of line 2"),
        ("b\tx\tloom\tcorpus\t\t", r"line 3: layout is 'loom': give one of '', h5ad, cellxgene"),
        ("b\tx\th5ad\ttrain\t\t", r"line 3: role is 'train': give one of corpus, evaluation"),
        ("b\tx\th5ad\tevaluation\t\tliver", r"line 3: evaluation_set is 'liver'"),
        ("b\tx\th5ad\tcorpus\t\tbreast", r"line 3: role is 'corpus' with evaluation_set 'breast'"),
        ("b\tx\th5ad\tcorpus\tsha256:12\t", r"line 3: checksum is 'sha256:12': give sha256: and 64"),
        ("b\tx\th5ad\tcorpus\tdeadbeef\t", r"line 3: checksum is 'deadbeef'"),
        (f"b\tx\th5ad\tcorpus\t{SHA}|{SHA}\t", r"line 3: 2 checksums for 1 addresses"),
        ("b\tftp://example.org/x\th5ad\tcorpus\t\t", r"line 3: url has scheme 'ftp'"),
        ("b\thttps:///x\th5ad\tcorpus\t\t", r"line 3: url is no https address"),
        ("b\thttps://[x/y\th5ad\tcorpus\t\t", r"line 3: url is no https address"),
        ("b\thttps://example.org/x|folder\tgeo\tcorpus\t\t", r"line 3: url holds several addresses, one of them"),
        ("b\thttps://example.org/x|\tgeo\tcorpus\t\t", r"line 3: url holds an empty address"),
        ("b\thttps://example.org/x#a/../../b\tgeo\tcorpus\t\t", r"line 3: url names 'a/../../b' inside"),
        ("b\tx\th5ad", r"line 3: 3 fields for 6 columns"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=r"sources\.tsv, " + message) as caught:
        read_manifest(write(tmp_path / "sources.tsv", "a\tx\th5ad\tcorpus\t\t", row))
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_wrong_tables_are_named(tmp_path):
    path = tmp_path / "sources.tsv"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_manifest(path)
    for content, message in (
        (b"", "is empty"),
        (b"id\turl\tlayout\n", "column 'role' is missing"),
        (b"id\turl\tlayout\trole\tcolour\n", "column 'colour' is unknown"),
        (b"id\tid\turl\tlayout\trole\n", "column 'id' is unknown or there twice"),
        (b"id\turl\xff\n", "is no UTF-8 table"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_manifest(path)


def test_select():
    sources = [Source("a"), Source("b", role="evaluation"), Source("c")]
    assert [s.id for s in select(sources)] == ["a", "b", "c"]
    assert [s.id for s in select(sources, ids=["c", "a"])] == ["a", "c"]
    assert [s.id for s in select(sources, role="corpus")] == ["a", "c"]
    assert select(sources, ids=["b"], role="corpus") == []
    with pytest.raises(ValueError, match="No source is called 'x', 'y' among the 3"):
        select(sources, ids=["a", "y", "x"])
    with pytest.raises(ValueError, match="role is 'test'"):
        select(sources, role="test")


def test_a_source_does_not_show_its_password():
    assert "secret" not in repr(Source("a", url="https://me:secret@example.org/x"))
