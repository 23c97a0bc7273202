//! Certificates for tests of TLS, made by openssl.

use std::fs;
use std::path::Path;

use anyhow::Result;

use crate::{Ran, tool};

/// Writes an authority's certificate (`ca.pem`), one of a server (`server.pem`, `server.key`), and one of a client that may open
/// `name`, in the folder `client` as QEMU and libnbd look for it; false if openssl is not there.
///
/// # Errors
/// If openssl fails.
pub fn certificates(dir: &Path, name: &str) -> Result<bool> {
    let Some(openssl) = tool("openssl") else {
        return Ok(false);
    };
    let run = |args: &str| -> Result<()> {
        let mut command = openssl.command();
        command.current_dir(dir).args(args.split_whitespace());
        Ran::run(&mut command)?.ok().map(drop)
    };
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
    run(&format!(
        "req -x509 {key} -keyout ca.key -out ca.pem -days 2 -subj /CN=authority"
    ))?;
    fs::write(
        dir.join("server.ext"),
        "subjectAltName=DNS:localhost,IP:127.0.0.1\n",
    )?;
    fs::write(dir.join("client.ext"), "extendedKeyUsage=clientAuth\n")?;
    let name = name.replace('/', "\\/");
    for (whose, subject) in [("server", "localhost"), ("client", &name)] {
        run(&format!(
            "req {key} -keyout {whose}.key -out {whose}.csr -subj /CN={subject}"
        ))?;
        run(&format!(
            "x509 -req -in {whose}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile {whose}.ext -out {whose}.pem"
        ))?;
    }
    let client = dir.join("client");
    fs::create_dir(&client)?;
    for (from, to) in [
        ("ca.pem", "ca-cert.pem"),
        ("client.pem", "client-cert.pem"),
        ("client.key", "client-key.pem"),
    ] {
        fs::copy(dir.join(from), client.join(to))?;
    }
    Ok(true)
}
