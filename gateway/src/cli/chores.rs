//! `quarry volume compact` and `quarry volume flatten`.

use super::Failure;
use super::output::Console;
use super::progress::{asking_for, spinner};
use super::table::bytes;
use crate::control::{ApiResult, Client, CompactSpec, MoveReport, VolumeRef};

pub(super) async fn compact(
    client: &Client,
    volume: &VolumeRef,
    held: bool,
    console: &mut Console<'_>,
) -> Result<(), Failure> {
    let spec = CompactSpec { held };
    let work = client.compact(volume, &spec);
    let report = watched(client, volume, "compacting", work).await?;
    console.show(&report, |report| compact_text(volume, held, report))
}

pub(super) async fn flatten(
    client: &Client,
    volume: &VolumeRef,
    console: &mut Console<'_>,
) -> Result<(), Failure> {
    let work = client.flatten(volume);
    let report = watched(client, volume, "flattening", work).await?;
    console.show(&report, |report| {
        let moved = bytes(report.moved_bytes);
        format!("{volume}: {moved} of its parent's are its own now; it needs its parent no more")
    })
}

async fn watched(
    client: &Client,
    volume: &VolumeRef,
    doing: &str,
    work: impl Future<Output = ApiResult<MoveReport>>,
) -> ApiResult<MoveReport> {
    let bar = spinner(&format!("{doing} {volume}"));
    let ask = async || {
        if let Ok(now) = client.move_progress(volume).await {
            bar.set_message(match now.total_bytes {
                0 => format!("{} moved", bytes(now.moved_bytes)),
                total => format!(
                    "pass {}: {} of {} moved",
                    now.passes,
                    bytes(now.moved_bytes),
                    bytes(total)
                ),
            });
        }
    };
    let report = asking_for(&bar, ask, work).await;
    bar.finish_and_clear();
    report
}

fn compact_text(volume: &VolumeRef, held: bool, report: &MoveReport) -> String {
    match (report.passes, report.moved_bytes) {
        (0, _) if held => format!("{volume}: its data lie in order, there was nothing to do"),
        (0, _) => format!(
            "{volume}: what no snapshot needs lies in order, there was nothing to do; --held moves the rest too"
        ),
        (1, moved) => format!("{volume}: {} were put in order", bytes(moved)),
        (passes, moved) => {
            let moved = bytes(moved);
            format!("{volume}: {moved} were moved in {passes} passes to put its data in order")
        }
    }
}
