//! `quarry trash`, and what of it is under `quarry volume`.

use super::Failure;
use super::args::TrashCommand;
use super::output::Console;
use super::progress::turning;
use super::table::{bytes, table, time_ms};
use crate::control::{Client, PurgeReport, PurgeSpec, TrashInfo, TrashList};

pub(super) async fn run(
    client: &Client,
    command: TrashCommand,
    console: &mut Console<'_>,
) -> Result<(), Failure> {
    match command {
        TrashCommand::List { tenant } => {
            let list = client.list_trash(tenant.as_ref()).await?;
            console.show(&list, list_text)
        }
        TrashCommand::Purge(flags) => {
            let spec = PurgeSpec {
                tenant: flags.tenant,
                id: flags.id,
                all: flags.all,
                older_than_ms: flags
                    .older_than
                    .map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX)),
            };
            let report = turning("purging", client.purge_trash(&spec)).await?;
            let Some(first) = report.kept.first() else {
                return console.show(&report, purge_text);
            };
            let message = format!(
                "{} of {} volumes are not purged: {}",
                report.kept.len(),
                report.kept.len() + report.purged.len(),
                first.problem.clone().unwrap_or_default()
            );
            if !console.is_json() {
                console.show(&report, purge_text)?;
            }
            Err(Failure::new("conflict", message, "see `quarry trash list`"))
        }
    }
}

/// What became of a volume that was deleted.
pub(super) fn deleted_text(info: &TrashInfo) -> String {
    let TrashInfo {
        tenant, name, id, ..
    } = info;
    let until = time_ms(info.purge_ms)
        .map(|time| format!(" until {time}"))
        .unwrap_or_default();
    let back = match &info.problem {
        // Not by `restore`: it goes by what the head says.
        Some(problem) => {
            format!("{problem}: `quarry volume rescue {tenant}/{name} --id {id} --apply`")
        }
        None => format!("`quarry volume restore {tenant}/{name}`"),
    };
    format!("{tenant}/{name}: it is in the trash{until}; {back} brings it back")
}

fn list_text(list: &TrashList) -> String {
    if list.trash.is_empty() {
        return "the trash is empty".to_owned();
    }
    let row = |t: &TrashInfo| {
        vec![
            format!("{}/{}", t.tenant, t.name),
            t.id.clone(),
            t.size_bytes.map(bytes).unwrap_or_default(),
            t.stored_bytes.map(bytes).unwrap_or_default(),
            time_ms(t.deleted_ms).unwrap_or_default(),
            time_ms(t.purge_ms).unwrap_or_default(),
            t.problem.clone().unwrap_or_default(),
        ]
    };
    let rows: Vec<_> = list.trash.iter().map(row).collect();
    table(
        &[
            "VOLUME", "ID", "SIZE", "STORED", "DELETED", "PURGED", "PROBLEM",
        ],
        &rows,
    )
}

fn purge_text(report: &PurgeReport) -> String {
    if report.purged.is_empty() {
        return "nothing was purged".to_owned();
    }
    let names = report.purged.iter();
    let names: Vec<_> = names.map(|t| format!("{}/{}", t.tenant, t.name)).collect();
    format!(
        "{} is purged, {} objects were deleted",
        names.join(", "),
        report.objects
    )
}
