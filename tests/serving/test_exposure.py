"""Who can reach a service, and what that asks for."""

import pytest

from loopfm_ray.errors import ConfigError, StoreError
from loopfm_ray.jobs.serving import ServeConfig, grpc_options, start
from loopfm_ray.serving.exposure import HA_PROXY, TlsConfig, check_tls
from tests.tls import make_certificate

TLS = {"cert": "cert.pem", "key": "key.pem"}


@pytest.mark.parametrize("settings", [{"host": "0.0.0.0"}, {"host": "ranker.example"}, {"grpc_port": 9000}])  # fmt: skip
def test_what_listens_beyond_loopback_takes_keys_or_a_trusted_network(settings):
    with pytest.raises(ValueError, match=r"loopfm key.*trusted_network"):
        ServeConfig(bundle="b", **settings)
    assert ServeConfig(bundle="b", api_keys="k", **settings)
    assert ServeConfig(bundle="b", trusted_network=True, **settings)


def test_ha_proxy_mode_takes_keys_or_a_trusted_network(monkeypatch):
    made_before = ServeConfig(bundle="b")
    monkeypatch.setenv(HA_PROXY, "1")
    with pytest.raises(ValueError, match=f"{HA_PROXY}.*loopfm key"):
        ServeConfig(bundle="b")
    # a config that was made, or read, elsewhere is looked at again where it counts
    with pytest.raises(ConfigError, match=HA_PROXY):
        made_before.check_doors()
    with pytest.raises(ConfigError, match=HA_PROXY):
        start(made_before)
    assert ServeConfig(bundle="b", api_keys="k")
    assert ServeConfig(bundle="b", trusted_network=True)
    monkeypatch.setenv(HA_PROXY, "0")
    assert ServeConfig(bundle="b")


def test_a_proxy_that_listens_elsewhere_than_the_config_says_counts():
    config = ServeConfig(bundle="b")
    config.check_doors("127.0.0.1")
    with pytest.raises(ConfigError, match=r"host 0\.0\.0\.0"):
        config.check_doors("0.0.0.0")
    ServeConfig(bundle="b", api_keys="k").check_doors("0.0.0.0")


def test_tls_does_not_go_with_what_has_none(monkeypatch):
    with pytest.raises(ValueError, match="gRPC proxy has no TLS"):
        ServeConfig(bundle="b", tls=TLS, grpc_port=9000, api_keys="k")
    monkeypatch.setenv(HA_PROXY, "1")
    with pytest.raises(ValueError, match="HAProxy mode of Ray Serve has no TLS"):
        ServeConfig(bundle="b", tls=TLS, api_keys="k")


def test_tls_takes_a_certificate_and_its_own_private_key(tmp_path):
    cert, key = make_certificate(tmp_path / "a")
    other_cert, _ = make_certificate(tmp_path / "b")
    _, hidden = make_certificate(tmp_path / "c", passphrase=b"secret")
    check_tls(TlsConfig(cert=str(cert), key=str(key)))
    for wrong_cert, wrong_key, why in (
        (other_cert, key, "no certificate with its key"),
        (cert, hidden, "without pass phrase"),
        (key, cert, "no certificate|chmod"),
        (cert, tmp_path / "none.pem", "is not there"),
    ):
        with pytest.raises(StoreError, match=why):
            check_tls(TlsConfig(cert=str(wrong_cert), key=str(wrong_key)))
    for mode in (0o640, 0o604):
        key.chmod(mode)
        with pytest.raises(StoreError, match="chmod 600"):
            check_tls(TlsConfig(cert=str(cert), key=str(key)))


def test_the_keys_of_tls_are_looked_at_before_anything_starts(tmp_path):
    cert, key = make_certificate(tmp_path)
    key.chmod(0o644)
    config = ServeConfig(bundle="b", tls={"cert": str(cert), "key": str(key)})
    with pytest.raises(StoreError, match="chmod 600"):
        start(config)


def test_grpc_is_off_by_default_and_never_reflects():
    assert ServeConfig(bundle="b").grpc_port is None
    assert grpc_options(None) is None
    assert grpc_options(9000)["enable_reflection"] is False
