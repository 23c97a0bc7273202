//! What there is: lists by pages, capacity, and whether a volume can be used as somebody wants to.

use quarry_csi_proto::v1::validate_volume_capabilities_response::Confirmed;
use quarry_csi_proto::v1::{
    GetCapacityRequest, GetCapacityResponse, ListSnapshotsRequest, ListSnapshotsResponse,
    ListVolumesRequest, ListVolumesResponse, ValidateVolumeCapabilitiesRequest,
    ValidateVolumeCapabilitiesResponse, list_snapshots_response, list_volumes_response,
};
use tonic::Status;

use super::ControllerService;
use super::snapshots::told as told_snapshot;
use super::volumes::told as told_volume;
use crate::control::dto::VOLUME_BYTES_MAX;
use crate::control::{ApiError, ImageRef, Kind, SnapRef, VolumeRef, if_found};
use crate::csi::answer::{Answer, given};
use crate::csi::capability::{Unfit, Use};
use crate::csi::class::{Class, bytes};
use crate::csi::ids;

/// Entries of a page at most.
const PAGE_MAX: usize = 1000;

/// Digits of the time in a snapshot's place in a list.
const PLACE_DIGITS: usize = 20;

/// How many entries a page has.
fn limit(max_entries: i32) -> Answer<usize> {
    match usize::try_from(max_entries) {
        Ok(0) => Ok(PAGE_MAX),
        Ok(limit) => Ok(limit.min(PAGE_MAX)),
        Err(_) => Err(Status::invalid_argument("there are no negative entries")),
    }
}

/// Where a page begins, if that is a place that a page ended with: `tenant volume`, or `tenant volume time snapshot`.
fn begin(token: &str, is_place: impl Fn(&str) -> bool) -> Answer<Option<&str>> {
    match token {
        "" => Ok(None),
        token if is_place(token) => Ok(Some(token)),
        _ => Err(Status::aborted("no list ended there: begin it anew")),
    }
}

fn is_volume(place: &str) -> bool {
    place.replacen(' ', "/", 1).parse::<ImageRef>().is_ok()
}

fn is_snapshot(place: &str) -> bool {
    let parts: Vec<&str> = place.split(' ').collect();
    let [tenant, volume, time, name] = parts[..] else {
        return false;
    };
    time.len() == PLACE_DIGITS
        && time.bytes().all(|b| b.is_ascii_digit())
        && format!("{tenant}/{volume}@{name}")
            .parse::<SnapRef>()
            .is_ok()
}

impl ControllerService {
    pub(super) async fn volumes_by_pages(
        &self,
        request: ListVolumesRequest,
    ) -> Answer<ListVolumesResponse> {
        let limit = limit(request.max_entries)?;
        let after = begin(&request.starting_token, is_volume)?;
        let page = self.client.page_of_volumes(limit, after).await?;
        // What is not in the list would be taken to be gone.
        if let Some(why) = page.incomplete {
            let remedy = "try again when the store answers";
            return Err(ApiError::new(Kind::Unavailable, why, remedy).into());
        }
        // What is attached of the past is in the list too, and is no volume.
        let volumes = page.volumes.iter().filter(|info| info.snapshot.is_none());
        let entry = |info: &crate::control::VolumeInfo| {
            let volume = VolumeRef::new(info.tenant.clone(), info.name.clone()).ok()?;
            Some(list_volumes_response::Entry {
                volume: Some(told_volume(&volume, info)),
                status: None,
            })
        };
        Ok(ListVolumesResponse {
            entries: volumes.filter_map(entry).collect(),
            next_token: page.next.unwrap_or_default(),
        })
    }

    pub(super) async fn snapshots_by_pages(
        &self,
        request: ListSnapshotsRequest,
    ) -> Answer<ListSnapshotsResponse> {
        let limit = limit(request.max_entries)?;
        let after = begin(&request.starting_token, is_snapshot)?;
        let nothing = Ok(ListSnapshotsResponse::default());
        let of = request.source_volume_id.as_str();
        let (snapshots, next) = match (request.snapshot_id.as_str(), of) {
            ("", "") => {
                let page = self.client.page_of_snapshots(None, limit, after).await?;
                (page.snapshots, page.next)
            }
            ("", of) => {
                let Ok(volume) = ids::volume(of) else {
                    return nothing;
                };
                let page = self.client.page_of_snapshots(Some(&volume), limit, after);
                let Some(page) = if_found(page.await)? else {
                    return nothing;
                };
                (page.snapshots, page.next)
            }
            (id, of) => {
                let Ok(snapshot) = ids::snapshot(id) else {
                    return nothing;
                };
                if !of.is_empty() && of != snapshot.volume.to_string() {
                    return nothing;
                }
                let found = if_found(self.client.show_snapshot(&snapshot).await)?;
                (found.into_iter().collect(), None)
            }
        };
        let entry = |info| list_snapshots_response::Entry {
            snapshot: Some(told_snapshot(info)),
        };
        Ok(ListSnapshotsResponse {
            entries: snapshots.iter().map(entry).collect(),
            next_token: next.unwrap_or_default(),
        })
    }

    /// What the tenant's quota leaves; without one the store has no end that anybody knows, and a volume may be as
    /// large as volumes are.
    pub(super) async fn capacity(
        &self,
        request: &GetCapacityRequest,
    ) -> Answer<GetCapacityResponse> {
        let capabilities = &request.volume_capabilities;
        let can = capabilities.is_empty() || Use::all(capabilities).is_ok();
        let available = match request.parameters.is_empty() {
            _ if !can => 0,
            true => VOLUME_BYTES_MAX,
            false => {
                let class = Class::parse(&request.parameters)?;
                let tenant = self.client.show_tenant(&class.tenant).await?;
                let has = tenant.usage.unwrap_or_default();
                let is_full = tenant
                    .settings
                    .volumes_max
                    .is_some_and(|max| has.volumes >= max)
                    || (tenant.settings.stored_bytes_max)
                        .is_some_and(|max| has.stored_bytes >= max);
                match tenant.settings.provisioned_bytes_max {
                    _ if is_full => 0,
                    Some(max) => max
                        .saturating_sub(has.provisioned_bytes)
                        .min(VOLUME_BYTES_MAX),
                    None => VOLUME_BYTES_MAX,
                }
            }
        };
        Ok(GetCapacityResponse {
            available_capacity: bytes(available),
            maximum_volume_size: Some(bytes(available.min(VOLUME_BYTES_MAX))),
            minimum_volume_size: None,
        })
    }

    pub(super) async fn validate(
        &self,
        request: ValidateVolumeCapabilitiesRequest,
    ) -> Answer<ValidateVolumeCapabilitiesResponse> {
        let id = given(&request.volume_id, "the volume's id")?;
        if request.volume_capabilities.is_empty() {
            return Err(Unfit::Missing("the volume's capabilities").invalid());
        }
        let volume = ids::volume(id)?;
        let info = self.show(&volume).await?;
        let mut problem = match Use::all(&request.volume_capabilities) {
            Ok(_) => None,
            Err(Unfit::Refused(why)) => Some(why),
            Err(missing) => return Err(missing.invalid()),
        };
        if problem.is_none() && !request.parameters.is_empty() {
            let class = Class::parse(&request.parameters)?;
            problem = match class.tenant == volume.tenant {
                true => class.differs(&info),
                false => Some(format!("the volume is not tenant {}'s", class.tenant)),
            };
        }
        if let Some(message) = problem {
            return Ok(ValidateVolumeCapabilitiesResponse {
                confirmed: None,
                message,
            });
        }
        Ok(ValidateVolumeCapabilitiesResponse {
            confirmed: Some(Confirmed {
                volume_context: request.volume_context,
                volume_capabilities: request.volume_capabilities,
                parameters: request.parameters,
                mutable_parameters: request.mutable_parameters,
            }),
            message: String::new(),
        })
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[test]
    fn token_is_where_a_page_ended_or_the_list_is_to_begin_anew() {
        assert_eq!(begin("", is_volume).unwrap(), None);
        assert_eq!(begin("acme db", is_volume).unwrap(), Some("acme db"));
        let place = "acme db 00000001700000000000 nightly";
        assert_eq!(begin(place, is_snapshot).unwrap(), Some(place));
        for wrong in ["invalid-token", "acme/db x", " ", "acme db 1 nightly"] {
            assert_eq!(
                begin(wrong, is_volume).unwrap_err().code(),
                Code::Aborted,
                "{wrong}"
            );
            assert_eq!(
                begin(wrong, is_snapshot).unwrap_err().code(),
                Code::Aborted,
                "{wrong}"
            );
        }
        assert_eq!(limit(-1).unwrap_err().code(), Code::InvalidArgument);
        assert_eq!((limit(0).unwrap(), limit(3).unwrap()), (PAGE_MAX, 3));
    }
}
