from ernie_serve.worker.cores import wait_shortly


def test_idle_threads_sleep_soon_unless_somebody_has_said_how_they_wait():
    environ: dict[str, str] = {}
    wait_shortly(environ)
    assert 1000 <= int(environ["GOMP_SPINCOUNT"]) <= 100_000
    for said in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}):
        kept = dict(said)
        wait_shortly(kept)
        assert kept == said
