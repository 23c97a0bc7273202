//! `quarry snapshot`.

use serde_json::json;

use super::Failure;
use super::args::SnapshotCommand;
use super::output::Console;
use super::progress::{shown, uploading};
use super::table::{bytes, fields, table, time_ms};
use crate::control::{Client, SnapshotInfo};

pub(super) async fn run(
    client: &Client,
    command: SnapshotCommand,
    console: &mut Console<'_>,
) -> Result<(), Failure> {
    match command {
        SnapshotCommand::Create { snapshot } => {
            let volume = snapshot.volume.clone().into();
            let call = client.create_snapshot(&snapshot);
            let made = uploading("snapshotting", client, &volume, call).await?;
            console.show(&made, |made| {
                format!(
                    "{snapshot}: it is there, with all up to write {}; read it with `quarry volume attach {snapshot}`",
                    made.newest_write
                )
            })
        }
        SnapshotCommand::List { volume } => {
            let list = client.list_snapshots(volume.as_ref()).await?;
            console.show(&list, |list| list_text(&list.snapshots))
        }
        SnapshotCommand::Show { snapshot } => {
            console.show(&client.show_snapshot(&snapshot).await?, show_text)
        }
        SnapshotCommand::Delete { snapshot } => {
            shown("deleting", &snapshot, client.delete_snapshot(&snapshot)).await?;
            let done = json!({ "snapshot": snapshot.to_string(), "done": "deleted" });
            console.show(&done, |_| format!("{snapshot}: it is deleted"))
        }
    }
}

fn place(snapshot: &SnapshotInfo) -> Option<String> {
    let attached = snapshot.attached.as_ref()?;
    let place = attached.link.as_ref().or(attached.device.as_ref());
    place.or(attached.uri.as_ref()).cloned()
}

fn state(snapshot: &SnapshotInfo) -> &'static str {
    match (snapshot.deleting, &snapshot.attached) {
        (true, _) => "being deleted",
        (_, Some(_)) => "attached",
        (_, None) => "kept",
    }
}

fn list_text(snapshots: &[SnapshotInfo]) -> String {
    if snapshots.is_empty() {
        return "there are no snapshots; make one with `quarry snapshot create TENANT/VOLUME@NAME`"
            .to_owned();
    }
    let row = |s: &SnapshotInfo| {
        vec![
            format!("{}@{}", s.volume, s.name),
            time_ms(s.created_ms).unwrap_or_default(),
            bytes(s.size_bytes),
            s.unique_bytes.map_or_else(|| "-".to_owned(), bytes),
            s.newest_write.to_string(),
            state(s).to_owned(),
            place(s).unwrap_or_default(),
        ]
    };
    let rows: Vec<_> = snapshots.iter().map(row).collect();
    let header = [
        "SNAPSHOT",
        "CREATED",
        "SIZE",
        "UNIQUE",
        "NEWEST WRITE",
        "STATE",
        "AT",
    ];
    table(&header, &rows)
}

fn unique(of: u64) -> String {
    format!("{}, which go when it is deleted", bytes(of))
}

fn show_text(s: &SnapshotInfo) -> String {
    let clones = s.clones.as_ref().map(|clones| match clones.is_empty() {
        true => "none".to_owned(),
        false => clones.join(", "),
    });
    fields(&[
        ("snapshot", Some(format!("{}@{}", s.volume, s.name))),
        ("created", time_ms(s.created_ms)),
        ("size", Some(bytes(s.size_bytes))),
        ("unique", s.unique_bytes.map(unique)),
        ("newest write", Some(s.newest_write.to_string())),
        ("state", Some(state(s).to_owned())),
        ("clones", clones),
        ("attached at", place(s)),
    ])
}
