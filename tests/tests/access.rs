//! Two tenants and a daemon whose API and NBD server are on TCP: with certificates, and tokens.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use quarry_tests::{Daemon, MIB, Ran, Site, certificates, free_port, tool};
use tempfile::{TempDir, tempdir};

/// Names of the other tenant's things, which no answer to the first may have.
const FOREIGN: [&str; 3] = ["zebra", "stripes", "hooves"];

/// How long random requests are made.
const FUZZ_SECONDS: &str = "45";

/// What every answer is held to.
const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,\
response_schema_conformance";

struct Place {
    dir: TempDir,
    daemon: Daemon,
    api: u16,
    nbd: u16,
}

impl Place {
    /// A daemon with the volume of each of two tenants; `None` where openssl is missing.
    fn new() -> Result<Option<Self>> {
        let dir = tempdir()?;
        if !certificates(dir.path(), "acme")? {
            return Ok(None);
        }
        let (api, nbd) = (free_port(), free_port());
        let at = |name: &str| dir.path().join(name).display().to_string();
        let settings = format!(
            "[daemon]\nnbd_listen = \"127.0.0.1:{nbd}\"\n\
             [access]\nlisten = \"127.0.0.1:{api}\"\ntls_cert = \"{}\"\ntls_key = \"{}\"\nnbd_client_ca = \"{}\"\n",
            at("server.pem"),
            at("server.key"),
            at("ca.pem"),
        );
        let site = Site::with_folder(dir.path(), "a")?.settings(&settings);
        let daemon = site.start()?;
        daemon.create("acme/db", 64 * MIB, &[])?;
        daemon.create("zebra/stripes", 64 * MIB, &[])?;
        for call in [
            ["snapshot", "create", "acme/db@nightly"],
            ["snapshot", "create", "zebra/stripes@hooves"],
        ] {
            daemon.quarry(&call)?;
        }
        Ok(Some(Self {
            dir,
            daemon,
            api,
            nbd,
        }))
    }

    /// Makes a token, and the file that it is in.
    fn token(&self, name: &str, how: &[&str]) -> Result<PathBuf> {
        let made = self.daemon.json(&[&["token", "create"], how].concat())?;
        let path = self.dir.path().join(name);
        fs::write(&path, made["token"].as_str().context("a token")?)?;
        Ok(path)
    }

    /// Calls `quarry` from afar.
    fn quarry(&self, token: &Path, arguments: &[&str]) -> Result<Ran> {
        let url = format!("https://localhost:{}", self.api);
        let mut command = self.daemon.site().command(arguments);
        command
            .args(["--url", &url, "--token-file"])
            .arg(token)
            .arg("--ca")
            .arg(self.dir.path().join("ca.pem"));
        Ran::run(&mut command)
    }
}

#[test]
fn tenant_from_afar_uses_its_volumes_and_sees_no_others() -> Result<()> {
    let Some(place) = Place::new()? else {
        return Ok(());
    };
    let admin = place.token(
        "admin",
        &["--tenant", "acme", "--role", "admin", "--expires", "1h"],
    )?;
    let reader = place.token("reader", &["--tenant", "acme", "--role", "read"])?;
    for call in [
        &["volume", "create", "acme/new", "--size", "1MiB"][..],
        &["volume", "attach", "acme/new"],
        &["snapshot", "create", "acme/new@s"],
        &["volume", "detach", "acme/new"],
        &["volume", "delete", "acme/new"],
        &["trash", "list"],
        &["volume", "restore", "acme/new"],
    ] {
        let ran = place.quarry(&admin, call)?;
        let said = ran.ok()?.stdout.clone();
        ensure!(FOREIGN.iter().all(|name| !said.contains(name)), "{said}");
    }
    let list = place.quarry(&reader, &["volume", "list"])?;
    let list = &list.ok()?.stdout;
    ensure!(
        list.contains("acme/new") && !list.contains("zebra"),
        "{list}"
    );
    for (token, call, word) in [
        (
            &reader,
            &["volume", "delete", "acme/db"][..],
            "tenant-admin",
        ),
        (&admin, &["tenant", "create", "mine"], "operator"),
        (
            &admin,
            &["volume", "attach", "acme/db", "--via", "ublk"],
            "operator",
        ),
        (
            &admin,
            &["volume", "show", "zebra/stripes"],
            "there is no volume zebra/stripes",
        ),
        (
            &admin,
            &["volume", "show", "nobody/stripes"],
            "there is no volume nobody/stripes",
        ),
        (&admin, &["status"], "operator"),
    ] {
        let ran = place.quarry(token, call)?;
        ensure!(ran.code == Some(1) && ran.stderr.contains(word), "{ran}");
    }
    let tokens = place.daemon.json(&["token", "list", "--tenant", "acme"])?;
    let id = tokens["tokens"][0]["id"]
        .as_str()
        .context("an id")?
        .to_owned();
    place.daemon.quarry(&["token", "revoke", &id])?;
    let ran = place.quarry(&admin, &["volume", "list"])?;
    ensure!(
        ran.code == Some(1) && ran.stderr.contains("no longer"),
        "{ran}"
    );

    let log = fs::read_to_string(place.daemon.site().root().join("data/audit.jsonl"))?;
    let secret = fs::read_to_string(&reader)?;
    let secret = secret.rsplit('_').next().context("a secret")?;
    ensure!(!log.contains(secret));
    let of_admin = log.lines().filter(|line| line.contains(&id)).count();
    // Seven changes of two lines each but the list, four refusals, and those of the token itself.
    ensure!(of_admin >= 16, "{of_admin} lines: {log}");
    place.daemon.stop()
}

#[test]
fn nbd_client_by_tls_opens_what_its_certificate_names() -> Result<()> {
    let (Some(place), Some(nbdinfo)) = (Place::new()?, tool("nbdinfo")) else {
        return Ok(());
    };
    drop(place.daemon.attach("acme/db", &[])?);
    drop(place.daemon.attach("zebra/stripes", &[])?);
    let folder = place.dir.path().join("client");
    let look = |export: &str| {
        let folder = folder.display();
        let uri = format!(
            "nbds://localhost:{}/{export}?tls-certificates={folder}",
            place.nbd
        );
        Ran::run(nbdinfo.command().args(["--size", &uri]))
    };
    ensure!(look("acme/db")?.ok()?.stdout.trim() == (64 * MIB).to_string());
    ensure!(look("zebra/stripes")?.code != Some(0));
    let plain = format!("nbd://localhost:{}/acme/db", place.nbd);
    ensure!(Ran::run(nbdinfo.command().args(["--size", &plain]))?.code != Some(0));
    place.daemon.stop()
}

/// Random requests, sound and not, as the API's own document describes them.
#[test]
fn random_requests_of_a_tenant_find_no_fault_and_no_foreign_name() -> Result<()> {
    let (Some(place), Some(st)) = (Place::new()?, tool("st")) else {
        return Ok(());
    };
    let token = place.token("admin", &["--tenant", "acme", "--role", "admin"])?;
    let token = fs::read_to_string(token)?;
    // So that most requests reach something.
    let names = "[parameters]\n\"path.tenant\" = \"acme\"\n\"path.volume\" = \"db\"\n\"path.snapshot\" = \"nightly\"\n";
    fs::write(place.dir.path().join("schemathesis.toml"), names)?;
    let url = format!("https://localhost:{}/v1/openapi.json", place.api);
    let mut command: Command = st.command();
    command
        .current_dir(place.dir.path())
        .args(["--no-color", "run", &url, "--tls-verify", "ca.pem"])
        .args(["--header", &format!("Authorization: Bearer {token}")])
        .args(["--max-time", FUZZ_SECONDS, "--continue-on-failure"])
        .args(["--phases", "coverage,fuzzing"])
        .args(["--checks", CHECKS])
        .args(["--report", "har", "--report-dir", "report"]);
    let ran = Ran::run(&mut command)?;
    ensure!(ran.code == Some(0), "{ran}");
    let mut answers = String::new();
    for entry in fs::read_dir(place.dir.path().join("report"))? {
        answers += &fs::read_to_string(entry?.path())?;
    }
    ensure!(answers.contains("acme"), "nothing was asked: {ran}");
    for name in FOREIGN {
        ensure!(!answers.contains(name), "{name}");
    }
    place.daemon.stop()
}
