"""Keys of a run: NKeys of its users, the authority of its own that signs the server's certificate.

A seed or a private key is never in an error, a log, or the arguments of a process: only in files of mode 0600 below
`OUT/join`, and in a worker's join file.
"""

import datetime
import importlib
import importlib.util
import secrets
import ssl
from pathlib import Path
from typing import Any

from troupe.cluster.ticket import check_private, write_secret
from troupe.errors import ConfigError, InputError, remedy

_YEARS = datetime.timedelta(days=3650)
_EARLIER = datetime.timedelta(days=2)
"""Clocks of other machines may be behind by this."""
_USES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


def check_packages() -> None:
    """InputError where packages of the extra `cluster` are missing."""
    missing = [name for name in ("cryptography", "nats", "nkeys") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"other machines need packages that are not installed ({missing[0]}); {remedy('cluster')}")


def new_seed() -> str:
    """A new user's key, as the seed that it is made of."""
    nkeys = importlib.import_module("nkeys")
    return bytes(nkeys.encode_seed(secrets.token_bytes(32), nkeys.PREFIX_BYTE_USER)).decode()


def public_key(seed: str) -> str:
    """What others may know of a key. ConfigError where the seed is none; it is not in the message."""
    nkeys = importlib.import_module("nkeys")
    try:
        return bytes(nkeys.from_seed(bytearray(seed.encode())).public_key).decode()
    except Exception:  # the library's errors hold what it was given
        raise ConfigError("`seed` is no seed of an NKey; copy the join file anew") from None


def server_name(run: str) -> str:
    """The name in the certificate of a run's server: it has this name at every address, also behind a tunnel."""
    return f"{run}.troupe.internal"


def certify(folder: Path, run: str) -> str:
    """Make what the server's certificate needs in a folder: `ca.pem`, `ca.key`, kept where they are there;
    `server.pem`, `server.key`, always new → the authority's certificate, in PEM."""
    ca_file, key_file = folder / "ca.pem", folder / "ca.key"
    if ca_file.exists() and key_file.exists():
        check_private(key_file)
        authority = _primitives("serialization").load_pem_private_key(key_file.read_bytes(), None)
    else:
        authority = _new_key()
        write_secret(key_file, _pem(authority))
        write_secret(ca_file, _certificate(_authority(run), authority, _authority(run), authority))
    own = _new_key()
    write_secret(folder / "server.key", _pem(own))
    write_secret(folder / "server.pem", _certificate(server_name(run), own, _authority(run), authority))
    return ca_file.read_text(encoding="ascii")


def client_context(ca: str) -> ssl.SSLContext:
    """TLS 1.3 with whoever has a certificate that this authority signed, and nobody else. ConfigError where it is no
    certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(cadata=ca)
    except (ssl.SSLError, ValueError):
        raise ConfigError("`ca` is no certificate; copy the join file anew") from None
    return context


def _authority(run: str) -> str:
    return f"troupe {run}"


def _primitives(name: str) -> Any:
    return importlib.import_module(f"cryptography.hazmat.primitives.{name}")


def _new_key() -> Any:
    curves = _primitives("asymmetric.ec")
    return curves.generate_private_key(curves.SECP256R1())


def _pem(key: Any) -> bytes:
    forms = _primitives("serialization")
    written: bytes = key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    return written


def _certificate(subject: str, key: Any, issuer: str, signer: Any) -> bytes:
    """A certificate in PEM: of an authority that signs servers only, where it signs itself; else of a server."""
    x509 = importlib.import_module("cryptography.x509")
    now, is_ca, public = datetime.datetime.now(datetime.UTC), key is signer, key.public_key()
    uses = dict.fromkeys(_USES, False) | {"key_cert_sign": is_ca, "crl_sign": is_ca, "digital_signature": not is_ca}
    more = [
        (x509.BasicConstraints(ca=is_ca, path_length=0 if is_ca else None), True),
        (x509.KeyUsage(**uses), True),
        (x509.SubjectKeyIdentifier.from_public_key(public), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False),
    ]
    if not is_ca:
        more.append((x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]), False))
        more.append((x509.SubjectAlternativeName([x509.DNSName(subject)]), False))
    builder = x509.CertificateBuilder(
        issuer_name=_named(issuer),
        subject_name=_named(subject),
        public_key=public,
        serial_number=x509.random_serial_number(),
        not_valid_before=now - _EARLIER,
        not_valid_after=now + _YEARS,
    )
    for extension, critical in more:
        builder = builder.add_extension(extension, critical=critical)
    signed = builder.sign(signer, _primitives("hashes").SHA256())
    written: bytes = signed.public_bytes(_primitives("serialization").Encoding.PEM)
    return written


def _named(name: str) -> Any:
    x509 = importlib.import_module("cryptography.x509")
    return x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, name)])
