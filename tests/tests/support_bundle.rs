//! `quarry support-bundle`: what is in it, and that no secret is, wherever one was.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{MIB, Ran, Site, tool};
use serde_json::Value;
use tempfile::tempdir;

/// Writes what only its owner may read, as secrets are.
fn private(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(())
}

/// The text of a file of an unpacked bundle.
fn text(folder: &Path, name: &str) -> Result<String> {
    let path = folder.join(name);
    fs::read_to_string(&path).with_context(|| path.display().to_string())
}

/// Makes a bundle, and unpacks it: what was said of it, its bytes, and the folder with its files.
fn bundle(command: &mut Command, archive: &Path, into: &Path) -> Result<(Value, Vec<u8>)> {
    let said = Ran::run(command)?.json()?;
    let bytes = fs::read(archive)?;
    ensure!(
        fs::metadata(archive)?.mode() & 0o777 == 0o600,
        "others may read it"
    );
    fs::create_dir(into)?;
    let mut untar = Command::new("tar");
    untar
        .args(["--strip-components=1", "--extract", "--file"])
        .arg(archive)
        .arg("--directory")
        .arg(into);
    Ran::run(&mut untar)?.ok()?;
    Ok((said, bytes))
}

#[test]
fn support_bundle_has_what_helps_and_none_of_the_secrets_that_were_planted() -> Result<()> {
    if tool("tar").is_none() {
        return Ok(());
    }
    let dir = tempdir()?;
    let at = |name: &str| dir.path().join(name);
    let word = |name: &str| at(name).display().to_string();
    let keygen = Site::with_folder(dir.path(), "keys")?
        .quarry(&["key", "generate", "acme-key"])?
        .ok()?;
    private(&at("keyring"), &keygen.stdout)?;
    let wrapping = keygen
        .stdout
        .split_whitespace()
        .last()
        .context("a key")?
        .to_owned();
    private(
        &at("credentials"),
        "[default]\naws_access_key_id = planted-id-credentials\naws_secret_access_key = planted/credentials+file\n",
    )?;
    private(
        &at("server.key"),
        "-----BEGIN PRIVATE KEY-----\nplantedTlsKeyLine0123456789\n-----END PRIVATE KEY-----\n",
    )?;

    let site = Site::with_folder(dir.path(), "a")?
        .settings(&format!("[keys]\nkeyring = \"{}\"\n", word("keyring")))
        .env("AWS_ACCESS_KEY_ID", "planted-daemon-id")
        .env("AWS_SECRET_ACCESS_KEY", "planted-daemon-environment");
    let daemon = site.start()?;
    daemon.create("acme/db", 64 * MIB, &["--key", "acme-key"])?;
    let mut disk = daemon.attach("acme/db", &[])?;
    disk.write(0, &[1; 4096], true)?;
    let made = daemon.json(&["token", "create", "--operator"])?;
    let token = made["token"].as_str().context("a token")?.to_owned();
    private(&at("token"), &token)?;

    // As the host's file would be, with a secret wherever one may stand.
    let config = format!(
        "[daemon]\ndata_dir = \"{}\"\n[access]\nlisten = \"127.0.0.1:1\"\ntls_cert = \"{}\"\ntls_key = \"{}\"\n\
         [store]\nurl = \"s3://bucket/prefix\"\nendpoint = \"http://127.0.0.1:1\"\nregion = \"r\"\n\
         access_key = \"planted-access-key\"\nsecret_key = \"planted-secret-key\"\nsession_token = \"planted-session-token\"\n\
         credentials_file = \"{}\"\n[keys]\nkeyring = \"{}\"\n",
        site.root().join("data").display(),
        word("server.pem"),
        word("server.key"),
        word("credentials"),
        word("keyring"),
    );
    fs::write(at("quarry.toml"), config)?;
    let secrets = [
        "planted-id-credentials",
        "planted/credentials+file",
        "plantedTlsKeyLine0123456789",
        "planted-daemon-id",
        "planted-daemon-environment",
        "planted-client-environment",
        "planted-access-key",
        "planted-secret-key",
        "planted-session-token",
        &wrapping,
        &token,
        token.rsplit_once('_').context("a secret")?.1,
    ];
    let mut log = fs::read_to_string(site.log())?;
    for secret in secrets {
        log.push_str(&format!(
            "INFO something said {secret} and went on\nfield={secret} of=it\n"
        ));
    }
    log.push_str("WARN http://user:planted-password@127.0.0.1:1/ does not answer\nthe end\n");
    // What nobody told of is told by how it looks.
    log.push_str(
        "GET /b?X-Amz-Signature=planted-signature HTTP/1.1\nAuthorization: Bearer planted-bearer\n",
    );
    fs::write(at("log"), log)?;

    let mut command = site.command(&["support-bundle", &word("b.tar"), "--output", "json"]);
    command
        .args([
            "--config",
            &word("quarry.toml"),
            "--log",
            &word("log"),
            "--token-file",
            &word("token"),
        ])
        .env("AWS_SECRET_ACCESS_KEY", "planted-client-environment");
    let (said, bytes) = bundle(&mut command, &at("b.tar"), &at("out"))?;
    let all = String::from_utf8_lossy(&bytes).into_owned();
    for secret in secrets.into_iter().chain(["planted"]) {
        let found = all
            .find(secret)
            .map(|at| &all[at.saturating_sub(80)..at + secret.len()]);
        ensure!(found.is_none(), "{secret} is in it: {found:?}");
    }
    let out = at("out");
    ensure!(
        said["missing"].as_array().is_some_and(Vec::is_empty),
        "{said}"
    );
    for (name, has) in [
        ("README.txt", "volumes.json: all volumes"),
        ("version.txt", "quarry "),
        ("config.txt", "s3://bucket/prefix"),
        ("kernel.txt", "Linux"),
        ("status.json", "\"ublk\":"),
        ("activity.json", "acme/db"),
        ("volumes.json", "\"acme-key\""),
        ("tenants.json", "\"acme\""),
        ("doctor.json", "\"checks\""),
        ("metrics.txt", "quarry_volume_writes_total"),
        ("audit.txt", " lines, "),
        ("log.txt", "the end\n"),
    ] {
        let text = text(&out, name)?;
        ensure!(text.contains(has), "{name}: {text}");
        ensure!(said["files"].to_string().contains(name), "{said}");
    }
    let audit = text(&out, "audit.txt")?;
    ensure!(
        !audit.contains(": 0 lines") && !audit.contains("method"),
        "{audit}"
    );
    // Nothing is written over.
    let again = Ran::run(&mut command)?.refusal()?;
    ensure!(again.mentions("b.tar"), "{again:?}");
    ensure!(fs::read(at("b.tar"))? == bytes, "it was");
    Ok(())
}

#[test]
fn support_bundle_without_a_daemon_has_the_rest_and_says_what_is_missing() -> Result<()> {
    if tool("tar").is_none() {
        return Ok(());
    }
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "a")?;
    let at = |name: &str| dir.path().join(name);
    let archive = at("b.tar").display().to_string();
    fs::write(at("bad.toml"), "[store]\nsecret_key = planted-secret\n")?;
    let config = at("bad.toml").display().to_string();
    let mut command = site.command(&[
        "support-bundle",
        &archive,
        "--output",
        "json",
        "--config",
        &config,
    ]);
    let (said, bytes) = bundle(&mut command, &at("b.tar"), &at("out"))?;
    ensure!(
        !String::from_utf8_lossy(&bytes).contains("planted"),
        "a secret of a broken file"
    );
    let missing: Vec<&str> = said["missing"]
        .as_array()
        .context("a list")?
        .iter()
        .filter_map(|missing| missing["file"].as_str())
        .collect();
    for name in [
        "status.json",
        "volumes.json",
        "tenants.json",
        "doctor.json",
        "metrics.txt",
        "config.txt",
        "log.txt",
    ] {
        ensure!(missing.contains(&name), "{said}");
    }
    let contents = text(&at("out"), "README.txt")?;
    ensure!(
        contents.contains("status.json") && contents.contains("MISSING"),
        "{contents}"
    );
    ensure!(
        text(&at("out"), "kernel.txt")?.contains("ublk"),
        "{contents}"
    );
    Ok(())
}
