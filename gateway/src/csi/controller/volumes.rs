//! Volumes: made empty, of a snapshot or of another volume, grown, deleted.
//!
//! A volume of a snapshot is its clone; one of another volume is a clone of a snapshot that is made for it, whose
//! name the clone's name gives. A call made again finds it by the clone, and makes it anew if that is not there. It
//! stays as long as the clone needs it, and is deleted with the source, or when something else is cloned of that.

use std::collections::HashMap;

use quarry_csi_proto::v1::volume_content_source::Type as Source;
use quarry_csi_proto::v1::{
    ControllerExpandVolumeRequest, ControllerExpandVolumeResponse, CreateVolumeRequest,
    CreateVolumeResponse, Topology as Place, TopologyRequirement, Volume, VolumeContentSource,
};
use quarry_objfmt::{SnapName, VolumeName};
use tonic::Status;

use super::{ControllerService, is_elsewhere};
use crate::control::{
    Kind, ParentInfo, ResizeSpec, SnapRef, State, VolumeInfo, VolumeRef, if_found,
};
use crate::csi::answer::{Answer, given, quota};
use crate::csi::capability::{Access, Unfit, Use};
use crate::csi::class::{Class, Topology, Wanted, bytes};
use crate::csi::ids;

/// A volume that is to be made.
pub(super) struct Plan {
    class: Class,
    name: VolumeName,
    wanted: Wanted,
    source: Option<VolumeContentSource>,
}

impl Plan {
    /// What a request says.
    ///
    /// # Errors
    /// If there can be no such volume.
    pub fn of(request: CreateVolumeRequest, topology: &Topology) -> Answer<Self> {
        let name = ids::volume_name(given(&request.name, "the volume's name")?)?;
        Use::all(&request.volume_capabilities).map_err(Unfit::invalid)?;
        if !request.mutable_parameters.is_empty() {
            return Err(Status::invalid_argument(
                "volumes have no mutable parameters",
            ));
        }
        let class = Class::parse(&request.parameters)?;
        let wanted = Wanted::of(request.capacity_range.as_ref())?;
        if let Some(where_to) = &request.accessibility_requirements {
            reachable(where_to, topology)?;
        }
        let source = request.volume_content_source;
        Ok(Self {
            class,
            name,
            wanted,
            source,
        })
    }

    /// Its two names as one.
    pub fn volume(&self) -> VolumeRef {
        VolumeRef {
            tenant: self.class.tenant.clone(),
            name: self.name.clone(),
        }
    }
}

/// Refuses places where what is made here cannot be used.
fn reachable(wanted: &TopologyRequirement, topology: &Topology) -> Answer<()> {
    let is_here = |place: &Place| {
        let mut segments = place.segments.iter();
        segments.all(|(key, segment)| topology.get(key).is_none_or(|here| here == segment))
    };
    if wanted.requisite.is_empty() || wanted.requisite.iter().any(is_here) {
        return Ok(());
    }
    let message = format!("volumes are made here for {topology:?}, and wanted elsewhere");
    Err(Status::resource_exhausted(message))
}

impl ControllerService {
    pub(super) async fn create(&self, plan: Plan) -> Answer<CreateVolumeResponse> {
        let source = plan.source.as_ref();
        let source = source.map(|s| s.r#type.as_ref().ok_or("the source is of no kind"));
        let info = match source.transpose().map_err(Status::invalid_argument)? {
            None => self.create_empty(&plan).await?,
            Some(Source::Snapshot(from)) => {
                let id = given(&from.snapshot_id, "the source's id")?;
                self.create_of_snapshot(&plan, &ids::snapshot(id)?).await?
            }
            Some(Source::Volume(from)) => {
                let id = given(&from.volume_id, "the source's id")?;
                self.create_of_volume(&plan, &ids::volume(id)?).await?
            }
        };
        let volume = plan.volume();
        let Plan { class, source, .. } = plan;
        let here = Place {
            segments: self.topology.clone().into_iter().collect(),
        };
        Ok(CreateVolumeResponse {
            volume: Some(Volume {
                capacity_bytes: bytes(info.size_bytes),
                volume_id: volume.to_string(),
                volume_context: class.context,
                content_source: source,
                accessible_topology: match self.topology.is_empty() {
                    true => Vec::new(),
                    false => vec![here],
                },
            }),
        })
    }

    async fn create_empty(&self, plan: &Plan) -> Answer<VolumeInfo> {
        let size = plan.wanted.size(0)?;
        let spec = plan.class.spec(plan.name.clone(), size);
        // First: one that is there is not to be counted again against its tenant's quota.
        if let Some(found) = self.there(&plan.volume()).await? {
            fits(&found, plan, None)?;
            return Ok(found);
        }
        match self.client.create_volume(&spec).await {
            Ok(made) => Ok(made),
            // Made by a call before this one, or something else.
            Err(error) if error.kind == Kind::Exists => {
                let found = self.show(&plan.volume()).await?;
                fits(&found, plan, None)?;
                Ok(found)
            }
            Err(error) if error.kind == Kind::NotFound => {
                Err(Status::invalid_argument(error.to_string()))
            }
            Err(error) => Err(quota(error)),
        }
    }

    async fn create_of_volume(&self, plan: &Plan, source: &VolumeRef) -> Answer<VolumeInfo> {
        let info = self.show(source).await?;
        same_tenant(plan, source)?;
        let of = |name| SnapRef {
            volume: source.clone(),
            name,
        };
        // Of a clone that is there none is made anew: if it is of another, that is told below.
        let snapshot = match self.there(&plan.volume()).await? {
            Some(there) => of(made_of(&there, source, &plan.name)),
            None => {
                let snapshot = of(self.free_for_clone(source, &plan.name).await?);
                let daemon = self.must_at_owner(source, &info)?;
                match daemon.create_snapshot(&snapshot).await {
                    // By another controller, since it was found to be free.
                    Err(error) if error.kind == Kind::Exists => {}
                    made => drop(made.map_err(quota)?),
                }
                snapshot
            }
        };
        let made = self.create_of_snapshot(plan, &snapshot).await?;
        self.sweep(source, &snapshot).await;
        Ok(made)
    }

    /// The steps: the clone, its size, its rates and retention. *Crash between them: the same call finds the clone,
    /// as large as its snapshot and attached nowhere, and goes on.*
    async fn create_of_snapshot(&self, plan: &Plan, snapshot: &SnapRef) -> Answer<VolumeInfo> {
        same_tenant(plan, &snapshot.volume)?;
        let found = self.client.show_snapshot(snapshot).await;
        let (volume, parent) = (plan.volume(), self.show(&snapshot.volume).await);
        let there = self.there(&volume).await?;
        let mut clone = match (there, found) {
            (Some(there), _) => there,
            (None, Err(error)) => return Err(error.into()),
            (None, Ok(snapshot_info)) => {
                if let Some(why) = plan.class.differs(&parent?) {
                    return Err(Status::invalid_argument(why));
                }
                // Before anything is made.
                plan.wanted.size(snapshot_info.size_bytes)?;
                match self.client.clone_snapshot(snapshot, &plan.name).await {
                    Ok(made) => made,
                    Err(error) if error.kind == Kind::Exists => self.show(&volume).await?,
                    Err(error) => return Err(quota(error)),
                }
            }
        };
        let of = ParentInfo {
            volume: snapshot.volume.to_string(),
            snapshot: snapshot.name.to_string(),
        };
        let size = plan.wanted.size(clone.size_bytes)?;
        if clone.parent.as_ref() == Some(&of)
            && clone.state == State::Detached
            && clone.size_bytes < size
        {
            let spec = ResizeSpec {
                size_bytes: size,
                force: false,
            };
            self.client.resize(&volume, spec).await.map_err(quota)?;
            clone.size_bytes = size;
        }
        fits(&clone, plan, Some(&of))?;
        if let Some(rates) = plan.class.rates().filter(|rates| *rates != clone.rates) {
            self.client.set_rates(&volume, rates).await?;
        }
        if let Some(retain_ms) = plan.class.retain_ms().filter(|ms| *ms != clone.retain_ms) {
            self.client.retain(&volume, retain_ms).await?;
        }
        Ok(clone)
    }

    pub(super) async fn delete(&self, volume: &VolumeRef) -> Answer<()> {
        let Some(info) = self.there(volume).await? else {
            return Ok(());
        };
        if is_elsewhere(&info) || info.attached.is_some() {
            let host = info.owner.as_ref().map_or("this host", |o| &o.host);
            let message = format!("{volume} is attached by host {host}");
            return Err(Status::failed_precondition(message));
        }
        // In the trash its snapshots would be nobody's to restore from.
        let snapshots = self.client.list_snapshots(Some(volume)).await?.snapshots;
        let (made, asked): (Vec<_>, Vec<_>) = snapshots
            .into_iter()
            .partition(|s| ids::is_for_clone(&s.name));
        if let Some(snapshot) = asked.first() {
            let message = format!(
                "{volume} has {} snapshots, such as {}: delete them first",
                asked.len(),
                snapshot.name
            );
            return Err(Status::failed_precondition(message));
        }
        for snapshot in made {
            let snapshot: SnapRef = format!("{volume}@{}", snapshot.name).parse()?;
            self.delete_snapshot_of(&snapshot).await?;
        }
        if_found(self.client.delete_volume(volume, false).await)?;
        Ok(())
    }

    pub(super) async fn expand(
        &self,
        volume: &VolumeRef,
        request: &ControllerExpandVolumeRequest,
    ) -> Answer<ControllerExpandVolumeResponse> {
        let range = request.capacity_range.as_ref();
        let range = range.ok_or_else(|| Status::invalid_argument("the capacity is missing"))?;
        let asked = request.volume_capability.as_ref();
        let asked = asked.map(|capability| Use::of(Some(capability)));
        let asked = asked.transpose().map_err(Unfit::invalid)?;
        let wanted = Wanted::of(Some(range))?;
        let info = self.show(volume).await?;
        let size = wanted.size(info.size_bytes)?;
        // Of what is asked for as a device nothing is to be done on the node, if it can be done from here.
        let mut node = !asked.is_some_and(|asked| asked.access == Access::Block);
        if size > info.size_bytes {
            match self.at_owner(&info)? {
                Some(daemon) => {
                    let spec = ResizeSpec {
                        size_bytes: size,
                        force: false,
                    };
                    let resized = daemon.resize(volume, spec).await.map_err(quota)?;
                    node |= resized.note.is_some();
                }
                // The node does it itself.
                None => node = true,
            }
        }
        Ok(ControllerExpandVolumeResponse {
            capacity_bytes: bytes(size),
            node_expansion_required: node,
        })
    }
}

fn same_tenant(plan: &Plan, source: &VolumeRef) -> Answer<()> {
    if plan.class.tenant == source.tenant {
        return Ok(());
    }
    let message = format!(
        "a volume of tenant {} cannot be made of {source}: data stay with their tenant",
        plan.class.tenant
    );
    Err(Status::invalid_argument(message))
}

/// The snapshot of `source` that this clone was made of; of another's clone, what it would be called.
fn made_of(clone: &VolumeInfo, source: &VolumeRef, name: &VolumeName) -> SnapName {
    let parent = clone.parent.as_ref();
    let parent = parent.filter(|parent| parent.volume == source.to_string());
    let made = parent.filter(|parent| ids::is_for_clone_called(&parent.snapshot, name));
    let made = made.and_then(|parent| SnapName::new(&parent.snapshot).ok());
    made.unwrap_or_else(|| ids::clone_snapshot(name, 0))
}

/// Refuses a volume that is there and is not what the plan makes.
fn fits(found: &VolumeInfo, plan: &Plan, parent: Option<&ParentInfo>) -> Answer<()> {
    let volume = plan.volume();
    let other = |why: String| {
        let message = format!("there is a volume {volume}, and it is another: {why}");
        Err(Status::already_exists(message))
    };
    if found.parent.as_ref() != parent {
        let of = |parent: Option<&ParentInfo>| {
            parent.map_or_else(
                || "nothing".to_owned(),
                |p| format!("{}@{}", p.volume, p.snapshot),
            )
        };
        let (has, wants) = (of(found.parent.as_ref()), of(parent));
        return other(format!("it was made of {has}, not of {wants}"));
    }
    let fits = found.size_bytes >= plan.wanted.required
        && plan.wanted.within_limit(found.size_bytes).is_ok();
    if !fits {
        return other(format!("it has {} bytes", found.size_bytes));
    }
    plan.class.differs(found).map_or(Ok(()), other)
}

/// What a caller may know of a volume beside its id.
pub(super) fn told(volume: &VolumeRef, info: &VolumeInfo) -> Volume {
    Volume {
        capacity_bytes: bytes(info.size_bytes),
        volume_id: volume.to_string(),
        volume_context: HashMap::new(),
        ..Volume::default()
    }
}
